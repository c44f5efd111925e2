"""What several scripts hold in the same words stays the same: who has read one knows the others."""

import ast
import inspect
import re

import pytest

import dit_dh
import fid
import flow_train
import rae_decoder_train
import rae_encoder
import sample

FENCE = ("# ---- The plumbing of a training", "# ---- The end of the same words")
TRAININGS = (rae_decoder_train, flow_train)


def shared_block(script):
    """The fenced lines of a training script."""
    before, fenced = inspect.getsource(script).split(FENCE[0])
    block, after = fenced.split(FENCE[1])
    assert not re.search("^(def|class) ", after, re.MULTILINE)  # it is the end of the file
    return block


def test_both_trainings_share_one_block_that_speaks_of_neither_stage():
    block = shared_block(rae_decoder_train)
    assert block == shared_block(flow_train)
    assert block.count("\ndef ") > 8 and len(block.splitlines()) <= 120
    words = set(re.findall("[a-z]+", block.split("\n", 1)[1].lower()))
    assert not words & {"decoder", "encoder", "disc", "discriminator", "gan", "flow", "latents", "stage"}


def test_what_the_block_looks_up_is_alike():
    """The same words mean the same only where their imports are the same; each script has its own FORMAT."""
    names = re.findall(r"^def (\w+)", shared_block(flow_train), re.MULTILINE)
    for name in names:
        code = inspect.unwrap(getattr(flow_train, name)).__code__
        for word in set(code.co_names) - {"FORMAT", *names}:
            ours, theirs = (vars(script).get(word) for script in TRAININGS)
            assert ours is theirs, (name, word)
    assert flow_train.FORMAT != rae_decoder_train.FORMAT


@pytest.mark.parametrize("name", ["to_rgb", "center_crop"])
def test_images_are_read_alike(name):
    assert inspect.getsource(getattr(fid, name)) == inspect.getsource(getattr(rae_encoder, name))


def test_files_are_taken_for_images_alike():
    """Pillow's limits are of the process: where both scripts are imported, it shows not which sets them."""
    assert fid.EXTENSIONS == rae_encoder.EXTENSIONS
    pattern = re.compile(r"^PngImagePlugin\.MAX\w+ = .*", re.MULTILINE)
    limits = [pattern.findall(inspect.getsource(script)) for script in (fid, rae_encoder)]
    assert limits[0] == limits[1] and len(limits[0]) == 2


def test_positions_are_embedded_alike():
    ours = inspect.getsource(rae_decoder_train.sincos_position)
    assert ours == inspect.getsource(dit_dh.sincos_position)


# Which building blocks a script may import from which
ARROWS = {
    rae_encoder: set(),
    rae_decoder_train: {"rae_encoder"},
    dit_dh: set(),
    flow_train: {"rae_encoder", "dit_dh"},
    sample: {"rae_encoder", "dit_dh", "rae_decoder_train"},
    fid: set(),
}


@pytest.mark.parametrize("script", ARROWS, ids=lambda script: script.__name__)
def test_a_script_imports_no_other_than_these(script):
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & {script.__name__ for script in ARROWS} == ARROWS[script]
