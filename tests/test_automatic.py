"""What stands as ``auto`` in my_images.yaml, for sets from a handful of images to ImageNet."""

import pytest

from common.automatic import CHOICES, automatic, choose
from common.config import Config, ConfigError
from common.data.loader import check_batch
from common.run import Run, complete, show_config
from tests import tiny


def chosen(num_images, size, accelerated=False, *overrides):
    config = Config.load("my_images.yaml", overrides)
    choose(config, num_images, size, accelerated)
    return config


def test_my_images_leaves_open_all_that_can_be_chosen():
    assert set(automatic(Config.load("my_images.yaml"))) == set(CHOICES)


@pytest.mark.parametrize("num_images, size, accelerated, expected", [
    (40, 32, False, {"views.size": 32, "method.encoder.arch": "w48p4", "train.batch_size": 16,
                     "method.dictionary.size": 16, "method.bn_groups": 2, "method.momentum": 0.99}),
    (50_000, 32, True, {"views.size": 32, "method.encoder.arch": "torchvision/resnet18", "train.batch_size": 256,
                        "method.dictionary.size": 8192, "method.bn_groups": 8, "method.momentum": 0.999}),
    (5_000, 300, True, {"views.size": 224, "method.encoder.arch": "torchvision/resnet18", "train.batch_size": 128,
                        "train.epochs": 800, "evaluate.every": 40}),
    (1_281_167, 400, True, {"views.size": 224, "method.encoder.arch": "torchvision/resnet50", "train.epochs": 100,
                            "method.dictionary.size": 65536, "method.bn_groups": 8, "evaluate.every": 5}),
])
def test_choices(num_images, size, accelerated, expected):
    config = chosen(num_images, size, accelerated)
    assert {where: config.get(where) for where in expected} == expected
    assert all(config.origin[where].startswith("chosen: ") for where in CHOICES) and not automatic(config)


@pytest.mark.parametrize("num_images", [4, 7, 8, 15, 16, 31, 33, 300, 5_001, 20_000, 10**6])
def test_every_set_of_four_images_or_more_can_be_trained_on(num_images):
    config = chosen(num_images, 64)
    batch, groups = config.get("train.batch_size"), config.get("method.bn_groups")
    check_batch(range(num_images), batch, 1, 1)
    assert batch >= 2 * groups and groups >= 2                              # as shuffled BatchNorm needs
    assert 16 <= config.get("method.dictionary.size") <= max(16, num_images // 4)
    assert config.get("train.epochs") >= config.get("evaluate.every") >= 1


def test_choices_follow_what_the_user_has_set():
    config = chosen(50_000, 300, True, "train.batch_size=32", "train.epochs=10", "views.size=32")
    assert config.get("method.bn_groups") == 2                              # not 8: batches of 32
    assert config.get("evaluate.every") == 1 and config.get("method.momentum") == 0.99
    assert config.get("method.encoder.arch") == "torchvision/resnet18"
    assert chosen(50_000, 300, False, "views.size=32").get("method.encoder.arch") == "w48p4"
    assert (config.get("train.batch_size"), config.get("train.epochs"), config.get("views.size")) == (32, 10, 32)


@pytest.mark.parametrize("where", ["train.clip", "views.mean", "method.temperature", "method.encoder.dim"])
def test_auto_where_it_is_not_known_is_refused_before_any_data_is_read(where):
    with pytest.raises(ConfigError, match=f"command line: {where}: 'auto' is not known here. It is for: views.size, "):
        complete(Config.load("my_images.yaml", [f"{where}=auto", "data.root=/no/such/folder"]))


@pytest.mark.parametrize("override, said", [("train.max_skipped=0", "max_skipped: 0 is less than 1"),
                                            ("checkpoint.keep=0", "at least 1 to keep"),
                                            ("evaluate.batch_size=0", "a batch_size of 1 or more")])
def test_values_that_mean_nothing_are_refused_before_any_data_is_read(override, said):
    with pytest.raises(ConfigError, match=said):
        complete(Config.load("my_images.yaml", [override, "data.root=/no/such/folder"]))


def test_mistakes_beside_an_auto_are_found_before_any_data_is_read():
    config = Config.load("my_images.yaml", ["train.batch=64", "evaluate.evry=3", "data.root=/no/such/folder"])
    with pytest.raises(ConfigError) as error:
        complete(config)
    assert "train.batch: TrainSettings takes no such key; did you mean 'batch_size'?" in str(error.value)
    assert "evaluate.evry: EvaluateSettings takes no such key; did you mean 'every'?" in str(error.value)


def test_print_config_shows_the_choice_and_the_reason(tmp_path):
    root = tiny.photos(tmp_path / "photos")
    lines = show_config(Config.load("my_images.yaml", [f"data.root={root}"])).splitlines()
    shown = {line.split(":")[0].strip(): line for line in lines if "# chosen: " in line}
    assert "size: 32" not in shown.get("dim", "") and "batch_size: 16" in shown["batch_size"]
    assert shown["batch_size"].endswith("# chosen: 40 images: short runs gain from more steps")
    assert sum("# chosen" in line for line in lines) == len(CHOICES) + 1            # and the run's folder
    assert "size: auto" in show_config(Config.load("my_images.yaml"))               # no images: nothing to choose from


def test_forty_photos_of_three_sizes_are_enough(tmp_path, capsys):
    root = tiny.photos(tmp_path / "photos", sizes=((32, 40), (48, 36), (28, 28)))
    overrides = [f"data.root={root}", f"run.dir={tmp_path / 'run'}", "train.epochs=2", "train.workers=1",
                 "train.device=cpu", "train.threads=1", "evaluate.protocols.0.backend=torch"]
    run = Run(Config.load("my_images.yaml", overrides)).train()
    said = capsys.readouterr().out
    assert [record["step"] for record in tiny.records(run.dir, "eval")] == [2, 2, 4, 4]
    assert tiny.summary(run.dir)["finished"] and "raw pixels" in said and "untrained" in said
    assert Config.load(run.dir / "config.yaml").get("method.encoder.arch") == "w48p4"
    Run(Config.load("my_images.yaml", overrides)).train()                           # chosen alike: the same run
    assert "finished already" in capsys.readouterr().out


def test_a_typo_in_the_data_section_is_answered_with_all_its_keys():
    """``channels`` is the images' own setting there, though the run gives the number to views and encoders."""
    with pytest.raises(ConfigError, match=r"data\.chanels: .* did you mean 'channels'\? It takes: .*channels"):
        complete(Config.load("my_images.yaml", ["data.root=photos", "data.chanels=1"]))
