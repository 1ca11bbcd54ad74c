"""Configs by name, in Python and on the command line, and the weights of the zoo."""

import hashlib
import logging
from pathlib import Path

import pytest
import torch

from sasa_det import model_zoo
from sasa_det.config.lazy import load_lazy_config
from sasa_det.config.load import load_config
from sasa_det.config_files import CONFIGS, find_config
from sasa_det.errors import CheckpointError, UsageError
from sasa_det.model_zoo.checkpoints import CHECKPOINTS, Weights

YAML = "COCO-Detection/retinanet_SASA_R_50_full.yaml"
LAZY = "COCO-Detection/retinanet_SASA_R_50_full.py"
SMALL = "Quick/retinanet_SASA.yaml"


def test_files_and_configs_by_name():
    assert Path(model_zoo.get_config_file(YAML)) == CONFIGS / YAML
    cfg = model_zoo.get_config(YAML)
    assert cfg == load_config(f"configs/{YAML}")
    cfg.MODEL.SASA.KERNEL_SIZE = 3  # it can be changed
    lazy = model_zoo.get_config(LAZY)
    assert lazy == load_lazy_config(f"configs/{LAZY}").config
    # Parts, from which users make LazyConfigs of their own.
    assert model_zoo.get_config("Common/train.py").train.keys() == lazy.train.keys()


@pytest.mark.parametrize("name", [YAML, LAZY])
def test_models_of_yaml_and_lazy_configs_are_the_same(name):
    model = model_zoo.get(name, device="cpu")
    assert model.training
    assert sum(weight.numel() for weight in model.parameters()) == 20_093_364


def test_what_is_not_there():
    for call in (model_zoo.get_config_file, model_zoo.get_config, model_zoo.get):
        with pytest.raises(RuntimeError) as error:
            call(YAML.replace("R_50", "R50"))
        assert str(error.value).endswith(
            f"is not a config of sasa_det.model_zoo; did you mean {YAML}?"
        )
    with pytest.raises(RuntimeError, match=r"^\.\./setup.py is not a config of sasa_det.model_zoo"):
        model_zoo.get_config_file("../setup.py")
    for call in (model_zoo.get_config, model_zoo.get):
        with pytest.raises(RuntimeError, match=f"no trained weights of {YAML} in sasa_det.model"):
            call(YAML, trained=True)


def test_trained_weights_are_those_of_their_digest(monkeypatch, tmp_path):
    torch.manual_seed(1)
    weights = model_zoo.get(SMALL, device="cpu").state_dict()
    file = tmp_path / "small.pth"
    torch.save({"model": weights}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(CHECKPOINTS, "Quick/retinanet_SASA", Weights(str(file), digest))

    assert model_zoo.get_checkpoint_url(SMALL) == f"{file}#sha256={digest}"
    assert model_zoo.get_config(SMALL, trained=True).MODEL.WEIGHTS == f"{file}#sha256={digest}"
    loaded = model_zoo.get(SMALL, trained=True, device="cpu").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert model_zoo.get_config(SMALL).MODEL.WEIGHTS == ""

    monkeypatch.setitem(CHECKPOINTS, "Quick/retinanet_SASA", Weights(str(file), "0" * 64))
    with pytest.raises(CheckpointError, match=f"has the SHA-256 {digest}, not 0000"):
        model_zoo.get(SMALL, trained=True, device="cpu")


def test_weights_in_the_package_and_at_an_address():
    inside = Weights("weights/a.pth", "1" * 64).address
    assert inside == f"{Path(model_zoo.__file__).parent / 'weights/a.pth'}#sha256={'1' * 64}"
    remote = Weights("https://example.org/a.pth", "1" * 64).address
    assert remote == f"https://example.org/a.pth#sha256={'1' * 64}"


def test_the_entries_of_the_zoo():
    """Each has a config, and the file of one in the package is that of its digest."""
    for name, weights in CHECKPOINTS.items():
        model_zoo.get_config_file(f"{name}.yaml")
        if not weights.place.startswith("https://"):
            path, _, digest = weights.address.partition("#sha256=")
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest


def test_config_files_by_name_on_the_command_line(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert load_config(SMALL) == load_config(str(CONFIGS / SMALL))
        assert load_lazy_config(LAZY, ["train.device=cpu"]).device == "cpu"
    told = [record.message for record in caplog.records if "config is" in record.message]
    assert [message.rpartition(" ")[2] for message in told] == [
        f"{CONFIGS / SMALL}.",
        f"{CONFIGS / LAZY}.",
    ]
    with pytest.raises(UsageError) as error:
        load_config("Quick/retinanet_SAS.yaml")
    assert str(error.value) == (
        f"config file Quick/retinanet_SAS.yaml does not exist; did you mean {SMALL}?"
    )
    # A file of the user comes first.
    own = tmp_path / SMALL
    own.parent.mkdir()
    own.write_text("SEED: 7\n")
    assert find_config(SMALL) == SMALL and load_config(SMALL).SEED == 7
