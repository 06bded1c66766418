"""Sweeps: every combination once, in a folder that depends on its own values alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_reg.errors import UserError
from dist_reg.launch.sweep import member_name, read_members

RUN = "model: minilm\ntask: demo\nmethods: [{hype: {sigma: 1e-5}}]\ntrain: {output_dir: out, seed: 7}\n"


def members(folder: Path, sweep: str, *overrides: str):
    (folder / "run.yaml").write_text(RUN)
    (folder / "sweep.yaml").write_text(sweep)
    return read_members(folder / "run.yaml", overrides, folder / "sweep.yaml")


def test_seeds_methods_and_tasks(tmp_path):
    found = members(
        tmp_path, "task: [rte, mrpc]\nmethods: [[], [hype], [{lnsr: {layer: 3}}]]\ntrain.seed: [0, 1]\n"
    )
    assert [member.name for member in found][:6] == [
        "rte_plain_seed-0", "rte_plain_seed-1", "rte_hype_seed-0", "rte_hype_seed-1", "rte_lnsr-layer-3_seed-0",
        "rte_lnsr-layer-3_seed-1",
    ]  # fmt: skip
    assert len(found) == 12
    one = found[5].run
    assert (one.task, one.train["seed"], one.methods) == ("rte", 1, [{"lnsr": {"layer": 3}}])
    assert one.output_dir == Path("out/rte_lnsr-layer-3_seed-1")


def test_overrides_hold_for_every_member(tmp_path):
    found = members(tmp_path, "train.seed: [0, 1]\n", "batch_size=4", "train.output_dir=a b")
    assert {member.run.batch_size for member in found} == {4}
    assert found[1].run.output_dir == Path("a b/seed-1")


def test_numbers_stay_numbers_and_texts_texts(tmp_path):
    found = members(tmp_path, 'methods.hype.sigma: [1e-5, 0.001]\ndata.text: ["1", null, "it\'s: [x]"]\n')
    assert [m.run.methods[0]["hype"]["sigma"] for m in found] == [1e-5] * 3 + [1e-3] * 3
    assert [m.run.data.text for m in found[:3]] == ["1", None, "it's: [x]"]


def test_a_name_depends_on_its_own_values_alone(tmp_path):
    small = members(tmp_path, "train.seed: [3]\nmethods: [[hype]]\n")
    large = members(tmp_path, "train.seed: [0, 3]\nmethods: [[], [hype]]\n")
    assert small[0].name in [member.name for member in large]


def test_hostile_values_have_harmless_names_of_their_own():
    values = ["a b", "a/b", "../x", "$(id)", "a\nb", "é", "", ".", "x" * 300]
    names = [member_name({"task": value}) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert name.isascii()
        assert not set(name) & set("/ $()\n")
        assert 0 < len(name) < 110
        assert not name.startswith(".")


MISTAKES = {
    "empty": ("", "a sweep holds keys with lists of values"),
    "a list": ("[1, 2]", "a sweep holds keys with lists of values"),
    "no list": ("train.seed: 3", "train.seed must be a list of values"),
    "empty list": ("train.seed: []", "train.seed must be a list of values"),
    "folder": ("train.output_dir: [a, b]", "train.output_dir cannot vary"),
    "twice": ("train.seed: [1, 1]", "seed-1 is there twice"),
    "unknown key": ("train_seed: [1]\nbatchsize: [2]", "unknown key"),
    "unknown method": ("methods: [[hyppe]]", "hyppe: methods: unknown method 'hyppe'; did you mean 'hype'?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_file_and_key(tmp_path, name):
    text, expected = MISTAKES[name]
    with pytest.raises(UserError) as raised:
        members(tmp_path, text)
    assert expected in str(raised.value)
    assert "sweep.yaml" in str(raised.value)
