"""The digits and the VAE that is trained on them."""

import numpy as np
import pytest
import torch

from iwin_dit.data.digits import Digits, train_digits_vae
from iwin_dit.data.images import centre_crop
from iwin_dit.data.sources import split_indices
from tests.test_data_sources import open_like_a_config


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_digits_are_bright_strokes_on_black(digits: Digits) -> None:
    assert len(digits) == len(digits.labels) == 1797
    assert digits.class_names == tuple("0123456789")
    assert digits.labels[:3] == [0, 1, 2]
    image = digits[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [0, 0, 0]
    assert image.max() > 230
    assert len(split_indices(digits.labels, 300, seed=0)[1]) == 300


def test_the_digits_as_a_source(digits: Digits) -> None:
    source = open_like_a_config("digits", num_classes=10, part_size=1000)
    assert (source.description, source.num_parts, source.class_names) == ("digits", 2, digits.class_names)
    items = [item for part in range(2) for item in source.items(part)]
    assert [item.label for item in items] == digits.labels
    assert items[1796].key == "digits[1796]"
    image = centre_crop(items[1000].read()[0], 32)
    assert np.array_equal(np.asarray(image), digits[1000].permute(1, 2, 0).numpy())
    assert len(list(digits.items(0))) == 1797


@pytest.mark.slow
def test_an_untrained_vae_is_refused_and_the_global_generator_is_left_alone(digits: Digits) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"expected 28\.0 or more"):
        train_digits_vae(digits, 300, seed=0, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
