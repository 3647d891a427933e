"""The zero-shot head against an independent, naive one; the encoder's features against one text at a time."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from magmax.continual.encoder import TextEncoder  # noqa: E402
from magmax.continual.heads import zero_shot_head  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

NAMES, TEMPLATES = ["3 14", "15", "9 26 5"], ["{}", "1 {} 2", "{} 7"]


def naive_features(encoder: TextEncoder, text: str) -> np.ndarray:
    ids = encoder.tokenizer([text], truncation=True, max_length=encoder.max_tokens)["input_ids"]
    with torch.no_grad():
        states = encoder.model(input_ids=torch.tensor(ids)).last_hidden_state[0].double().numpy()
    mean = states.mean(axis=0)
    return mean / np.sqrt((mean**2).sum())


def test_features_do_not_depend_on_what_else_is_in_the_batch(encoder: TextEncoder) -> None:
    texts = ["1 2 3 4 5 6", "7", "8 9 10"]
    with torch.no_grad():
        together = encoder(encoder.tokenize(texts)).numpy()
    apart = np.stack([naive_features(encoder, text) for text in texts])
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_texts_are_cut_and_chunks_do_not_matter(encoder: TextEncoder) -> None:
    texts = [" ".join(map(str, range(n))) for n in (1, 8, 9, 30)]
    ids = encoder.tokenize(texts)
    assert [len(each) for each in ids] == [1, 8, 8, 8]
    assert ids == encoder.tokenize(texts, chunk=1)


def test_the_head_is_the_mean_of_the_templates_with_rows_as_long_as_the_temperature(
    encoder: TextEncoder,
) -> None:
    head = zero_shot_head(encoder, NAMES, TEMPLATES, temperature=20.0)
    expected = []
    for name in NAMES:
        mean = np.mean([naive_features(encoder, template.format(name)) for template in TEMPLATES], axis=0)
        expected.append(20.0 * mean / np.sqrt((mean**2).sum()))
    np.testing.assert_allclose(head.numpy(), np.stack(expected), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(head.numpy(), axis=1), 20.0, rtol=1e-6)
    assert not head.requires_grad


def test_the_model_stays_in_the_mode_it_was_in(encoder: TextEncoder) -> None:
    encoder.model.train()
    zero_shot_head(encoder, NAMES, TEMPLATES, 1.0)
    assert encoder.model.training


@pytest.mark.parametrize("templates", [[], ["{}", "no name in here"]])
def test_a_template_without_the_name(encoder: TextEncoder, templates: list[str]) -> None:
    with pytest.raises(MagMaxError, match="where the class name goes"):
        zero_shot_head(encoder, NAMES, templates, 1.0)
