"""Trackers: every step's figures arrive, and a missing package is named."""

from __future__ import annotations

import sys
import types

import pytest

import tiny
import xtokmap
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.support.track import flat

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")


@pytest.fixture
def settings(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("the sky")
    return {"prompts": str(prompts), "output": str(tmp_path / "mine"), "steps": 2, "batch_size": 2, "max_new_tokens": 6}


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_every_steps_figures_arrive(settings, monkeypatch, name):
    calls = []
    package = types.ModuleType(name)
    package.init = lambda **how: calls.append(("init", how["project"], how["name"], how["config"]["steps"]))
    package.log = lambda figures, step: calls.append(("log", step, figures))
    package.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, package)
    result = train(Config(**settings, track=name, device="cpu"), models=tiny.pair())
    assert calls[0] == ("init", "xtokmap", "mine", 2)
    assert [c[1] for c in calls[1:-1]] == [1, 2]
    assert calls[1][2] | {"step": 1} == flat(result.metrics[0])
    assert calls[1][2]["coverage/ONE_TO_ONE"] == result.metrics[0]["coverage"]["ONE_TO_ONE"]
    assert calls[1][2]["warnings"] == 0
    assert calls[-1] == ("finish",)


def test_a_missing_tracker_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(xtokmap.XTokMapError, match="track='trackio': the package is not installed"):
        train(Config(**settings, track="trackio", device="cpu"), models=tiny.pair())
    with pytest.raises(xtokmap.XTokMapError, match="track='csv': use one of trackio, wandb"):
        Config(track="csv")
