"""Where configs lie, and that a caller's own Hydra stays as it was."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from trainer.options import config
from trainer.options.config import config_folder, hydra_kept, node_of, register_open_nodes


def test_configs_lie_inside_a_package_or_beside_it(tmp_path, monkeypatch):
    assert (config_folder() / "train.yaml").is_file()
    monkeypatch.setattr(config, "__file__", str(tmp_path / "trainer" / "options" / "config.py"))
    assert config_folder() == tmp_path / "conf"
    (tmp_path / "trainer" / "conf").mkdir(parents=True)
    assert config_folder() == tmp_path / "trainer" / "conf"


@pytest.mark.parametrize(
    ("content", "group", "node"),
    [
        ("a: 1\n", "model", "model"),
        ("a: 1\n", "hydra/sweeper", "hydra.sweeper"),
        ("# @package _global_\na: 1\n", "recipe", ""),
        ("# @package optimizer.inner\n", "model", "optimizer.inner"),
        ("a: 1\n# @package _global_\n", "model", "model"),
        ("", "model", "model"),
    ],
)
def test_a_choice_comes_under_the_node_that_its_file_says(tmp_path, content, group, node):
    (tmp_path / "a.yaml").write_text(content)
    assert node_of(tmp_path / "a.yaml", group) == node


def test_open_nodes_take_keys_that_no_default_names():
    with hydra_kept():
        register_open_nodes()
        for name in config._OPEN:
            node = ConfigStore.instance().load(f"open_{name}.yaml").node
            node[name].anything = 3
            assert node[name].anything == 3


@pytest.fixture
def callers_hydra(tmp_path):
    """A Hydra program of the caller's, with a config, a stored node and a version base of its own."""
    (tmp_path / "own.yaml").write_text("a: 1\n")
    with hydra_kept(), initialize_config_dir(str(tmp_path), version_base="1.2"):
        ConfigStore.instance().store(name="stored", node={"b": 2}, group="group")
        yield tmp_path


def stays():
    assert GlobalHydra.instance().is_initialized()
    assert compose("own", ["+group=stored"]) == {"a": 1, "group": {"b": 2}}
    assert str(VersionBase.instance().getbase()) == "1.2"
    assert "theirs.yaml" not in ConfigStore.instance().repo


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_what_the_caller_has_composed_stored_and_chosen_stays(callers_hydra, tmp_path, error):
    (tmp_path / "second.yaml").write_text("c: 3\n")

    def ours():
        with hydra_kept():
            assert not GlobalHydra.instance().is_initialized()
            ConfigStore.instance().store(name="theirs", node={})
            ConfigStore.instance().store(name="stored", node={"b": 99}, group="group")
            with initialize_config_dir(str(tmp_path), version_base="1.3"):
                assert compose("second") == {"c": 3}
            if error:
                raise error

    stays()
    if error:
        with pytest.raises(error):
            ours()
    else:
        ours()
    stays()
