"""The papers' data sets from tiny local copies in the formats of Hugging Face `datasets`; no test needs a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from tests.continual.tiny_clip import save_tiny_clip  # noqa: E402

from magmax.continual.data.hub_datasets import FILE_NAME_DOMAIN, HubPictures, hub, images, pool  # noqa: E402
from magmax.continual.data.scenarios import data_sets, domain_incremental, published_order  # noqa: E402
from magmax.continual.evaluation.accuracy import logits_of, score  # noqa: E402
from magmax.continual.registry import build  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGMAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def picture(seed: int) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def image_folder(folder: Path, classes: list[str], per_class: int, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """SPLIT/CLASS/STYLE_N.png; the seed of each picture is all that it is of."""
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(per_class):
                style = "art" if i % 2 else "toy"
                picture(1000 * s + 100 * c + i).save(folder / split / name / f"{style}_{i}.png")
    return folder


def table(n: int, offset: int = 0, **more: Any) -> Any:
    """A table of pictures `img` and numbered classes `fine_label`, as CIFAR-100 has them."""
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["apple_pie", "bear", "RedFox"])}
    columns = {"img": [picture(offset + i) for i in range(n)], "fine_label": [i % 3 for i in range(n)]}
    for name, (values, feature) in more.items():
        features[name], columns[name] = feature, values
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def pixels(items: Any) -> list[bytes]:
    return [np.asarray(item).tobytes() for item in items]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    found = images(str(image_folder(tmp_path / "own", ["001.Black_footed", "AnnualCrop"], 3)))
    assert found.classes == ["Black footed", "Annual Crop"]
    assert found.prompts[1] == ["a photo of a Annual Crop"]
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert pixels(found.train.items) == pixels([picture(s) for s in (1, 0, 2, 101, 100, 102)])  # by name: art, toy
    assert pixels(found.test.items[2:4]) == pixels([picture(1002), picture(1101)])


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_cifar_100_in_the_hubs_own_formats(tmp_path: Path, kind: str) -> None:
    train, test = table(9), table(6, 50)
    path = tmp_path / "cifar"
    if kind == "parquet":
        (path / "data").mkdir(parents=True)
        train.to_parquet(path / "data" / "train-00000-of-00001.parquet")
        test.to_parquet(path / "data" / "test-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(train=train, test=test).save_to_disk(path)
    found = hub("cifar100", str(path))
    assert list(found.classes) == ["apple pie", "bear", "Red Fox"]
    assert found.train.labels.tolist() == [0, 1, 2] * 3
    assert pixels(found.test.items) == pixels([picture(50 + i) for i in range(6)])
    few = hub("cifar100", str(path), train_per_class=1, seed=1)
    assert (len(few.train), len(few.test)) == (3, 6)
    where = [pixels(found.train.items).index(one) for one in pixels(few.train.items)]
    assert [found.train.labels[i] for i in where] == few.train.labels.tolist()
    assert where == sorted(where)


def test_a_local_copy_of_another_format_serves_too(tmp_path: Path) -> None:
    found = hub("cifar100", str(image_folder(tmp_path / "own", ["bear", "fox"], 2)), templates=["this is {}"])
    assert found.prompts == [["this is bear"], ["this is fox"]]


def test_domains_of_a_column(tmp_path: Path) -> None:
    names = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    domain = ([i % 6 for i in range(36)], datasets.ClassLabel(names=names))
    whole = table(36, domain=domain).rename_columns({"img": "image", "fine_label": "label"})
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "net")
    found = hub("domainnet", str(tmp_path / "net"))
    assert list(found.domains) == names
    tasks = domain_incremental(found, seed=0, order="domainnet")
    assert [task.name for task in tasks] == ["clipart", "sketch", "real", "infograph", "quickdraw", "painting"]
    assert [names[task.domain or 0] for task in tasks] == published_order("domains", "domainnet")
    assert all(len(task.rows(found.train.labels, found.train.domains)) == 6 for task in tasks)


def test_imagenet_r_has_no_training_split_and_its_domains_in_the_file_names(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "r", ["n01443537", "n01484850"], 10, splits=("test",))
    found = hub("imagenet_r", str(path))
    assert list(found.domains) == ["art", "toy"]
    assert (len(found.train), len(found.test)) == (16, 4)
    assert not set(pixels(found.train.items)) & set(pixels(found.test.items))
    for data in (found.train, found.test):
        for item, label, domain in zip(data.items, data.labels, data.domains, strict=True):  # pyright: ignore
            (seed,) = [100 * label + i for i in range(10) if pixels([picture(100 * label + i)]) == pixels([item])]
            assert domain == (0 if seed % 2 else 1)
    again = hub("imagenet_r", str(path))
    assert pixels(again.test.items) == pixels(found.test.items)


def test_classes_that_are_codes_get_their_names(tmp_path: Path) -> None:
    """As in ImageNet-R: a WordNet number, and the name in another column; class c is the c-th number, sorted."""
    codes = (["n2", "n1", "n2", "n1"], datasets.Value("string"))
    names = (["goldfish", "hen", "goldfish", "hen"], datasets.Value("string"))
    table(4, wnid=codes, class_name=names).to_parquet(tmp_path / "train.parquet")
    found = images(str(tmp_path), label="wnid", names="class_name", test="train")
    assert list(found.classes) == ["hen", "goldfish"]
    assert sorted([*found.train.labels, *found.test.labels]) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"train": "validation"}, "no split 'validation'; it has train"),
        ({"label": "coarse"}, r"no column of classes \(coarse\)"),
        ({"image": "jpg", "label": "fine_label"}, r"no column of pictures \(jpg\)"),
        (
            {"label": "fine_label", "domain": "style"},
            r"no column of domains \(style\); its columns are img, fine_label",
        ),
        ({}, "no column of classes"),
        ({"label": "number"}, "have no names; give `classes`"),
        ({"label": "fine_label", "classes": ["one", "two"]}, "has 3 classes, and 2 names"),
        ({"label": "fine_label", "domain": FILE_NAME_DOMAIN}, "does not keep the pictures' file names"),
    ],
)
def test_what_a_table_lacks(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    table(6, number=(list(range(6)), datasets.Value("int64"))).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(MagMaxError, match=why):
        images(str(tmp_path), **options)


def test_names_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MagMaxError, match=r"no data set 'cifar10'.*cifar100"):
        hub("cifar10")
    with pytest.raises(MagMaxError, match=r"no folder here, and no OWNER/NAME of the hub"):
        images(str(tmp_path / "none"))
    for path in ("pandas", "./data.py", "owner/data.py", "../data"):  # a builder of pickles, scripts, a folder
        with pytest.raises(MagMaxError, match=r"no folder here, and no OWNER/NAME of the hub"):
            images(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MagMaxError, match=r"empty: this folder cannot be read"):
        images(str(tmp_path / "empty"))


def test_pictures_are_read_when_they_are_asked_for_and_say_what_they_are(tmp_path: Path) -> None:
    path = str(image_folder(tmp_path / "own", ["a", "b"], 2))
    first, second = images(path), images(path)
    assert isinstance(first.train.items, HubPictures)
    assert isinstance(second.train.items, HubPictures)
    assert first.train.items.identity == second.train.items.identity
    code = f"""if True:
        import sys
        from magmax.continual.data.hub_datasets import images
        from magmax.continual import registry
        assert not {{'datasets', 'torch'}} & set(sys.modules)  # needed only to read
        print(images({path!r}).train.items.identity)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == first.train.items.identity
    few = first.train.pick(np.array([3, 1]))
    assert isinstance(few.items, HubPictures)
    assert pixels(few.items) == [pixels(first.train.items)[i] for i in (3, 1)]
    others = {
        id(data): data.items.identity for data in (first.train, first.test, images(path, train_per_class=1).train)
    }  # pyright: ignore
    assert len(set(others.values())) == 3


def test_fusion_benchs_pool_in_its_order_and_the_papers(tmp_path: Path) -> None:
    parts = ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
    for i, name in enumerate(parts):
        count = {"eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10}.get(name, 2 + i % 2)
        image_folder(tmp_path / name, [f"{c:03}" for c in range(count)], 1)
    whole = build("data", {"pool": {"name": "ta8", "folder": str(tmp_path)}})
    assert [name for name, _ in whole.parts] == parts
    assert [len(own) for _, own in whole.parts] == [2, 3, 2, 10, 10, 43, 10, 3]
    assert len(whole.classes) == len(whole.prompts) == 83
    tasks = data_sets(whole, seed=0, order="eight")
    assert [task.name for task in tasks] == ["cars", "mnist", "eurosat", "svhn", "resisc45", "sun397", "dtd", "gtsrb"]
    assert tasks[1].classes == tasks[1].among == tuple(range(70, 80))
    assert "roundabout" in whole.classes[27 + 40]
    assert pixels([whole.test.items[2]]) == pixels([picture(1000)])
    encoder = build("model", {"clip": {"path": str(save_tiny_clip(tmp_path / "clip"))}})
    logits = logits_of(encoder, build("head", "zero_shot", encoder, whole), encoder.prepare(whole.test.items))
    assert logits.shape == (83, 83)
    aware, agnostic = (score(logits, whole.test, data_sets(whole, 0, aware), learned=8) for aware in (True, False))
    assert all(a >= b for a, b in zip(aware.tasks, agnostic.tasks, strict=True))
    assert aware.micro > agnostic.micro  # chance among few classes, and among all
    with pytest.raises(MagMaxError, match=r"no pool 'ta9'.*ta8"):
        pool("ta9")
