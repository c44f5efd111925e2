"""What several scripts hold in the same words stays the same: who has read one knows the others."""

import inspect

import pytest

import dit_dh
import fid
import flow_train
import rae_decoder_train
import rae_encoder

FENCE = ("# ---- What any training needs", "# ---- The end of the same words")


def shared_block(script):
    """The fenced lines of a training script."""
    before, fenced = inspect.getsource(script).split(FENCE[0])
    block, after = fenced.split(FENCE[1])
    return block


def test_both_trainings_share_one_block():
    ours = shared_block(rae_decoder_train)
    assert ours.count("\ndef ") > 15
    assert ours == shared_block(flow_train)


@pytest.mark.parametrize(
    "name",
    ["Parser", "bounded", "natural_order", "list_images", "to_rgb", "center_crop", "keep_freed_memory"],
)
def test_flags_and_images_are_read_alike(name):
    assert inspect.getsource(getattr(fid, name)) == inspect.getsource(getattr(rae_encoder, name))


def test_what_these_functions_look_up_is_alike():
    assert fid.EXTENSIONS == rae_encoder.EXTENSIONS


def test_positions_are_embedded_alike():
    ours = inspect.getsource(rae_decoder_train.sincos_position)
    assert ours == inspect.getsource(dit_dh.sincos_position)
