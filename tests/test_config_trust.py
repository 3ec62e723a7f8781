"""What a config that came from a file may call: public things of trusted packages, where their class is wanted."""

import contextlib
import sys

import pytest
from torch import nn

from common.config import TRUSTED, Config, ConfigError
from common.data.views import Views
from common.encoder import Encoder
from common.method import Method
from common.run import Run, pretrain  # noqa: F401  (pretrain: as a package may pass it on)
from common.sections import SECTIONS, check_early, complete, open_config
from tests import tiny

PLACES = {"data": "data", "views": "views", "method": "method", "encoder": "method.encoder", "optimizer": "optimizer",
          "dictionary": "method.dictionary", "schedule": "schedule", "size": "method.dictionary.size",
          "lr": "optimizer.lr", "dir": "run.dir", "protocol": "evaluate.protocols.0", "mean": "views.mean"}
WRITES = {                                                                  # of ours, what writes, deletes or runs
    "common.checkpoint.save": {"path": "canary", "state": {}}, "common.checkpoint.Folder": {"path": "canary"},
    "common.log.Records": {"path": "canary"}, "common.run.pretrain": {"config": "demo.yaml", "dir": "canary"},
    "common.run.load_run": {"path": "."}, "common.environment.commit": {},
    "common.data.show.show_views": {"images": 1, "views": 1, "seed": 1, "path": "canary"}}


OPEN = {"method": "common.method.Method", "method.dictionary": "common.dictionary.Dictionary",     # may take any key
        "method.encoder": "tests.test_config_trust.open_encoder", "views": "tests.test_config_trust.Loose"}
INSIDE = {"a call": lambda call: call, "a list": lambda call: [1, [call]], "a mapping": lambda call: {"y": [call]}}


def open_encoder(dim: int = 16, x: object = None, **more) -> Encoder:
    return tiny.dropout_encoder(dim, 3)


class Loose(Views):
    def __init__(self, x, *args, **more):
        self.x = x


class Unsaid(Method):
    def __init__(self, encoder, dictionary, **more):
        super().__init__()
        self.encoder, self.dictionary = encoder, dictionary


def stranger(root, tmp_path, *overrides: str, trusted=(*TRUSTED, "tests")) -> Config:
    text = tiny.settings(root, tmp_path / "run").text()
    return Config.parse(text, "tiny.yaml", overrides, trusted)


@pytest.fixture
def root(tmp_path):
    return tiny.photos(tmp_path / "photos", count=4)


@pytest.mark.parametrize("name", ["os.system", "subprocess.run", "builtins.exec", "shutil.rmtree", "torch.hub.load",
                                  "torch.load", "numpy.fromfile", "tests.tiny.photos"])
def test_another_package_is_refused_and_not_even_imported(name, root, tmp_path):
    config = stranger(root, tmp_path, f"data={{name: {name}, x: 1}}", trusted=TRUSTED)
    for check in (check_early, complete):
        with pytest.raises(ConfigError, match=f"command line: data.name: would call '{name}'.* not trusted; common"):
            check(config)
    sys.modules.pop("this", None)
    with pytest.raises(ConfigError, match="not trusted"):
        complete(stranger(root, tmp_path, "data={name: this.s}"))
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", ["common.run.Path", "common.checkpoint.zipfile", "common.run.os", "moco.method.Tensor",
                                  "common.run._choose", "common.__dict__.get", "common.config.tree.hashlib.sha256"])
def test_what_a_trusted_package_only_imports_or_hides_is_refused(name, root, tmp_path):
    with pytest.raises(ConfigError, match=r"data.name: "):
        complete(stranger(root, tmp_path, f"data={{name: {name}}}"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRITES)
def test_nothing_of_ours_that_acts_may_stand_anywhere(name, place, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = stranger(root, tmp_path)
    config.set(PLACES[place], {"name": name, **WRITES[name]}, "a stranger")
    with contextlib.suppress(ConfigError):
        check_early(config)                             # does not know every place, and calls nothing
    with pytest.raises(ConfigError, match="a stranger: "):
        complete(config)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", OPEN)
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", [*WRITES, "moco.pretrain", "tests.test_config_trust.pretrain"])
def test_nothing_that_acts_is_called_where_any_value_may_stand(name, inside, place, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = stranger(root, tmp_path)
    call = {"name": name, **WRITES.get(name, WRITES["common.run.pretrain"])}
    config.set(place, {"name": OPEN[place], "x": INSIDE[inside](call)}, "a stranger")
    with pytest.raises(ConfigError, match="a stranger: "):
        config.build(place, channels=3)
    assert not (tmp_path / "canary").exists()


def test_a_call_of_pretrain_cannot_widen_what_is_trusted(root, tmp_path):
    shell = f"data={{name: subprocess.getoutput, cmd: touch {tmp_path}/canary}}"
    inner = {"name": "common.run.pretrain", "config": "demo", "trust": ["subprocess"], "overrides": [shell]}
    for place in ("method", "method.dictionary"):
        config = stranger(root, tmp_path)
        config.set(place, {"name": OPEN[place], "x": inner}, "a stranger")
        with pytest.raises(ConfigError, match="'common.run.pretrain' is no part of a run"):
            Run(config)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("target", ["common.method.Method", "common.dictionary.Dictionary"])
def test_a_constructor_that_is_torchs_takes_no_keys(target):
    with pytest.raises(ConfigError, match="method.x: .* takes no such key"):
        Config({"method": {"name": target, "x": 1}}, {}, "python").build("method")


def test_a_part_may_stand_where_a_users_class_does_not_say_what_it_takes(root, tmp_path):
    config = stranger(root, tmp_path)
    config.set("method", {"name": "tests.test_config_trust.Unsaid", "encoder": config.get("method.encoder"),
                          "dictionary": config.get("method.dictionary")}, "a user")
    assert isinstance(config.build("method", "common.method.Method", channels=3).dictionary, nn.Module)
    config.set("method.dictionary", {"name": "common.data.show.show_views"}, "a stranger")
    with pytest.raises(ConfigError, match="nothing here asks for a call of common.data.show.show_views"):
        config.check("method")


@pytest.mark.parametrize("section", [name for name, target in SECTIONS.items() if isinstance(target, str)])
def test_a_section_takes_only_what_gives_its_class(section, root, tmp_path):
    others = {"data": "common.data.digits", "views": "common.data.recipes.digits", "method": "moco.EndToEnd",
              "schedule": "common.schedule.constant", "optimizer": "common.optim.sgd"}
    for name in {*others.values(), "common.evaluate.KNN"} - {others[section]}:
        with pytest.raises(ConfigError, match=f"{section}: wants "):
            complete(stranger(root, tmp_path, f"{section}={{name: {name}}}"))


def test_a_package_is_let_in_by_name_and_a_programs_own_config_may_name_all(root, tmp_path):
    assert complete(stranger(root, tmp_path)).get("method.encoder.name") == "tests.tiny.dropout_encoder"
    complete(stranger(root, tmp_path, trusted=None))
    (tmp_path / "tiny.yaml").write_text(stranger(root, tmp_path).text())
    with pytest.raises(ConfigError, match=r"method.encoder.name: .*--trust tests"):
        complete(open_config(tmp_path / "tiny.yaml"))
    complete(open_config(tmp_path / "tiny.yaml", trust=["tests"]))
