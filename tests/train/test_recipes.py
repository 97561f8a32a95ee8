import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vpdeploy.errors import SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train.config import read_toml
from vpdeploy_train.data.augmentation import scaled_side
from vpdeploy_train.data.example import DataSource
from vpdeploy_train.inputs import check_data
from vpdeploy_train.pace import warmup_steps
from vpdeploy_train.recipes import RECIPES, recipe_named
from vpdeploy_train.settings import TrainSettings, every_option

CLASSES = {
    **{"cifar100": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10},
    **{"sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    **{"clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16},
    **{"smallnorb_azi": 18, "smallnorb_ele": 9},
}
FGVC_CLASSES = {"cub": 200, "nabirds": 555, "flowers": 102, "dogs": 120, "cars": 196}


def merge(recipe, **values):
    return TrainSettings.merge({"data": "photos", "recipe": recipe}, values)


def test_every_published_task_has_its_number_of_classes():
    expected = {f"vtab/{name}": count for name, count in CLASSES.items()}
    expected |= {f"fgvc/{name}": count for name, count in FGVC_CLASSES.items()}
    assert {name: recipe.classes for name, recipe in RECIPES.items()} == expected


def test_the_documentation_lists_every_recipe_with_its_classes():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, recipe in RECIPES.items():
        assert re.search(rf"^\|.*`{name}`[^|]*\| {recipe.classes} \|", page, re.MULTILINE), name


@pytest.mark.parametrize("method", ["e2vpt", "vapt", "vpt-deep", "linear"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_settings_that_are_valid(name, method):
    settings = merge(name, method=method)
    assert (settings.recipe, settings.method) == (name, method)
    assert set(RECIPES[name].settings(method)) <= every_option().keys()


def test_vtab_is_squashed_and_not_varied():
    settings = merge("vtab/dtd")
    assert (settings.resize, settings.augment, settings.batch_size, settings.image_size) == ("squash", "none", 64, 224)
    assert (settings.optimizer, settings.epochs, settings.normalisation) == ("sgd", 100, "imagenet")
    # 800 images in batches of 64 are 13 steps an epoch: ten epochs of warm-up.
    assert warmup_steps(settings.warmup_epochs, epochs=settings.epochs, steps_per_epoch=13) == 10 * 13


def test_fine_grained_images_are_scaled_to_256_and_cropped_to_224():
    settings = merge("fgvc/cub")
    assert (settings.resize, settings.augment, settings.batch_size) == ("crop", "crop-flip", 128)
    assert settings.crop_ratio is not None
    assert settings.image_size is not None
    preprocessing = Preprocessing(
        image_size=settings.image_size, crop_ratio=settings.crop_ratio, mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert (preprocessing.image_size, preprocessing.image_size / preprocessing.crop_ratio) == (224, 256)
    assert scaled_side(preprocessing) == 256


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("vtab/svhn", (10, 5)),
        ("vtab/cifar100", (5, 5)),
        ("vtab/dsprites_ori", (5, 5)),
        ("vtab/caltech101", (32, 5)),
        ("vtab/oxford_flowers102", (1, 1)),
        ("vtab/patch_camelyon", (10, 10)),
        ("fgvc/cars", (5, 5)),
    ],
)
def test_prompts_are_as_long_as_published(name, lengths):
    settings = merge(name, method="e2vpt")
    assert (settings.options.prompt_tokens, settings.options.kv_tokens) == lengths


def test_vapt_has_its_own_length_and_published_rates():
    settings = merge("fgvc/dogs", method="vapt")
    options = settings.options
    assert (options.prompt_tokens, options.vapt_hidden, settings.lr, settings.weight_decay) == (10, 8, 25.0, 1e-3)
    assert merge("fgvc/dogs").lr is None
    assert merge("vtab/cifar100", method="vapt").options.prompt_tokens == 10


def test_other_options_win_over_a_recipe_wherever_it_stands():
    merged = TrainSettings.merge({"data": "photos", "epochs": 3}, {"recipe": "vtab/kitti", "batch_size": 5})
    assert (merged.epochs, merged.batch_size, merged.resize) == (3, 5, "squash")


def test_a_recipe_survives_the_settings_file(tmp_path):
    settings = merge("fgvc/nabirds", method="vapt", epochs=3)
    (tmp_path / "args.toml").write_text(settings.to_toml(), encoding="utf-8")
    stored = read_toml(tmp_path / "args.toml")
    assert stored["recipe"] == "fgvc/nabirds"
    assert stored["crop_ratio"] == 0.875
    assert TrainSettings.merge(stored) == settings


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vtab/cifar10", "did you mean vtab/cifar100"),
        ("cub", r"did you mean fgvc/cub\?"),
        ("vtab/caltech", "did you mean vtab/caltech101"),
        ("zzz", "choose one of: vtab/cifar100, "),
    ],
)
def test_an_unknown_name_lists_close_ones(name, message):
    with pytest.raises(SpecError, match=f"^--recipe '{name}': no such recipe; {message}"):
        recipe_named(name)
    with pytest.raises(SpecError, match=f"^--recipe '{name}': no such recipe; {message}"):
        merge(name)


def source(classes, val=()):
    labels = tuple(map(str, range(classes)))
    return DataSource(spec="photos", labels=labels, train=(), val=val, test=(), augmentation="none")


def test_another_number_of_classes_and_an_unpublished_rate_are_remarked_upon(caplog):
    with caplog.at_level(logging.WARNING, "vpdeploy.train"):
        check_data(merge("vtab/svhn"), source(11, val=(None,)))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "recipe vtab/svhn is for 10 classes, the data has 11: is it the right data set?"
    assert "no learning rate was published for this method" in messages[1]
    assert len(messages) == 2


def test_a_recipe_that_fits_and_a_given_rate_need_no_remark(caplog):
    with caplog.at_level(logging.WARNING, "vpdeploy.train"):
        check_data(merge("vtab/svhn", lr=1.0), source(10, val=(None,)))
        check_data(merge("fgvc/cub", method="vapt"), source(200, val=(None,)))
    assert not caplog.records


def test_what_is_chosen_on_validation_images_is_refused_without_them():
    settings = TrainSettings(data="photos#final", prune=True)
    with pytest.raises(SpecError, match="photos: no validation images to choose by; use --no-prune, or leave #final"):
        check_data(settings, source(3))
    with pytest.raises(SpecError, match="use --early-stop 0"):
        check_data(replace(settings, prune=False, early_stop=3), source(3))
    check_data(replace(settings, prune=False), source(3))
