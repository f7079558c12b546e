import pickle
import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from fasternet.data.transforms import create_transform, normalize_batch
from fasternet.models.checkpoint import Preprocessing

SMALL = Preprocessing(input_size=32)
RAND_AUGMENT = "rand-m7-mstd0.5-inc1"


def create_noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@pytest.mark.parametrize("size", [(300, 260), (17, 40), (224, 224), (640, 33)])
@pytest.mark.parametrize(("input_size", "crop_ratio"), [(224, 0.9), (128, 0.9), (64, 0.875), (32, 1.0)])
def test_evaluation_transform_equals_timms(size, input_size: int, crop_ratio: float) -> None:
    preprocessing = Preprocessing(input_size=input_size, crop_ratio=crop_ratio)
    theirs = timm.data.create_transform((3, input_size, input_size), interpolation="bicubic", crop_pct=crop_ratio)
    image = create_noise(*size)
    assert torch.equal(create_transform(preprocessing, training=False)(image), theirs(image))


def test_evaluation_transform_resizes_224_at_0_9_to_248() -> None:
    image = create_noise(400, 300)
    values = torch.from_numpy(np.array(image.resize((330, 248), Image.Resampling.BICUBIC)))  # (248, 330, 3)
    crop = values[12:-12, 53:-53].permute(2, 0, 1) / 255
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    ours = create_transform(preprocessing, training=False)(image)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(ours, (crop - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 200), (200, 1)])
def test_transform_of_a_white_tiny_picture_is_white(training: bool, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(input_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
    transform = create_transform(preprocessing, training=training)
    for seed in range(50):
        seed_all(seed)
        assert torch.equal(transform(Image.new("RGB", size, "white")), torch.ones(3, 32, 32))


def test_transform_of_a_long_strip_is_its_middle_at_no_great_cost(monkeypatch) -> None:
    strip = create_noise(20_000, 2)
    transform = create_transform(SMALL, training=False)
    expected = transform(strip.crop((9_990, 0, 10_010, 2)))
    resize, widths = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda s, *args: widths.append(args[0][0]) or resize(s, *args))
    torch.testing.assert_close(transform(strip)[..., 2:-2], expected[..., 2:-2])
    assert max(widths) == 35 * 32


def test_training_transform_handles_any_picture_mean_and_seed() -> None:
    preprocessing = Preprocessing(input_size=24, mean=(-0.5, 0.0, 1.5), std=(1.0, 2.0, 0.1))
    transform = create_transform(preprocessing, training=True, rand_augment=RAND_AUGMENT)
    images = [create_noise(1, 1), create_noise(50, 3), create_noise(40, 60)]
    for seed in range(100):
        seed_all(seed)
        output = transform(images[seed % 3])
        assert output.shape == (3, 24, 24)
        assert output.isfinite().all()


def test_training_transform_repeats_with_the_seeds() -> None:
    transform = create_transform(SMALL, training=True, rand_augment=RAND_AUGMENT)
    outputs = []
    for seed in (0, 1, 0):
        seed_all(seed)
        outputs.append(transform(create_noise(60, 40)))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_training_transform_without_augmentation_is_the_resized_picture() -> None:
    image = create_noise(32, 32)
    transform = create_transform(SMALL, training=True, random_resized_crop=(1.0, 1.0), flip=False)
    plain = create_transform(Preprocessing(input_size=32, crop_ratio=1.0), training=False)(image)
    # At full area the aspect can only be 1, or the crop falls back to the whole square.
    for seed in range(5):
        seed_all(seed)
        assert torch.equal(transform(image), plain)


def test_training_transform_flips_half_of_the_pictures() -> None:
    image = create_noise(32, 32)
    transform = create_transform(SMALL, training=True, random_resized_crop=(1.0, 1.0))
    plain = create_transform(Preprocessing(input_size=32, crop_ratio=1.0), training=False)(image)
    torch.manual_seed(0)
    outputs = [transform(image) for _ in range(60)]
    num_flipped = sum(torch.equal(output, plain.flip(-1)) for output in outputs)
    assert num_flipped + sum(torch.equal(output, plain) for output in outputs) == 60
    assert 18 <= num_flipped <= 42


@pytest.mark.parametrize("training", [False, True])
def test_transform_for_one_channel_is_grey(training: bool) -> None:
    preprocessing = Preprocessing(input_size=32, mean=(0.5,), std=(0.5,))
    transform = create_transform(preprocessing, training=training, rand_augment=RAND_AUGMENT)
    for seed in range(30):
        seed_all(seed)
        assert transform(create_noise(40, 40)).shape == (1, 32, 32)


def test_transform_survives_pickling() -> None:
    transform = create_transform(SMALL, training=True, rand_augment=RAND_AUGMENT)
    copy = pickle.loads(pickle.dumps(transform))
    seed_all(3)
    expected = transform(create_noise(50, 50))
    seed_all(3)
    assert torch.equal(copy(create_noise(50, 50)), expected)


@pytest.mark.parametrize("words", ["rand-mx", "rand-m3-mstdx", "rand", "v0", "rand-m3-p2", "rand-m3-t0"])
def test_misspelt_rand_augment_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=f"rand_augment='{words}' is not understood"):
        create_transform(SMALL, training=True, rand_augment=words)


def test_four_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mean=\(0\.5, 0\.5, 0\.5, 0\.5\) must have a value per channel"):
        create_transform(Preprocessing(mean=(0.5,) * 4, std=(1.0,) * 4), training=False)


def test_bytes_normalized_as_a_batch_equal_pictures_normalized_one_by_one() -> None:
    preprocessing = Preprocessing(input_size=32)
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(3)]
    batches = []
    for normalize in (True, False):
        transform = create_transform(preprocessing, training=True, normalize=normalize)
        torch.manual_seed(0)
        batches.append(torch.stack([transform(picture) for picture in pictures]))
    assert (batches[0].dtype, batches[1].dtype) == (torch.float32, torch.uint8)
    bytes_before = batches[1].clone()
    torch.testing.assert_close(normalize_batch(batches[1], preprocessing), batches[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(batches[1], bytes_before)
