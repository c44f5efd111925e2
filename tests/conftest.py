"""The scripts live one folder up and are imported as they are; every test has a time limit."""

import contextlib
import faulthandler
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import helpers  # noqa: E402
from helpers import equal, message, read  # noqa: E402, F401

import rae_encoder  # noqa: E402

SECONDS = 180  # of a test with its fixtures: a deadlock of ranks is a failure, not a hang
STDERR = []  # pytest's own, in which a traceback is seen at once


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes or takes longer than a second")
    STDERR.append(os.dup(2))
    # nohup and shells' background jobs ignore signals, which the processes of tests would inherit.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    def expire(*_):
        kill_children(os.getpid())
        pytest.fail(f"no end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    # Where the main thread waits outside of Python no signal is handled: a minute later the suite ends.
    faulthandler.dump_traceback_later(SECONDS + 60, exit=True, file=STDERR[0])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        helpers.kill_started()


def kill_children(pid):
    """Kill all that process `pid` has started, and what these have started, where there is a /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                child = int(stat.parent.name)
                kill_children(child)
                os.kill(child, signal.SIGKILL)


@pytest.fixture(autouse=True)
def process_settings():
    """A part of a main sets up its process, in which the next test is another program."""
    with rae_encoder.keeps_process_settings():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with 22 images of the demo."""
    monkeypatch.chdir(tmp_path)
    rae_encoder.draw_demo("data/demo", num=22)
    return tmp_path


@pytest.fixture(scope="session")
def cats(tmp_path_factory):
    """Two classes, eleven images of several sizes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(11):
        path = root / ("cat 10" if i % 2 else "cat 9") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        helpers.picture(40 + 3 * i, 70 - 2 * i, seed=i).save(path)
    return root


@pytest.fixture
def one_thread():
    """Small networks are fastest on one thread: two that share busy cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
