import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fasternet.models.checkpoint import Preprocessing, save_checkpoint
from fasternet.models.registry import create_model
from fasternet.train.classification import train
from fasternet.train.distill import Teacher, compute_distillation, create_teacher
from fasternet.train.recipe import Recipe

NAMES = ("bright", "dark")
TINY_MODEL = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16}
STUDENT = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.0, 0.3]])
TEACHER = torch.tensor([[1.0, 1.5, -2.0], [0.0, 3.0, 0.1]])


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = create_model("fasternet_t0", num_classes=2, **TINY_MODEL)
    model(torch.randn(8, 3, 32, 32))
    save_checkpoint(tmp_path / "teacher", model, name="fasternet_t0", class_names=NAMES)
    return tmp_path / "teacher"


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_the_scaled_divergence(recipe: Recipe, tau: float) -> None:
    recipe = dataclasses.replace(recipe, distillation="soft", distillation_alpha=0.3, distillation_tau=tau)
    student, teacher = (STUDENT / tau).softmax(1), (TEACHER / tau).softmax(1)
    divergence = (teacher * (teacher / student).log()).sum()
    expected = 0.7 * 1.25 + 0.3 * divergence * tau**2 / 6
    torch.testing.assert_close(compute_distillation(recipe, torch.tensor(1.25), STUDENT, TEACHER), expected)


def test_hard_distillation_is_the_cross_entropy_with_the_teacher_s_choice(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, distillation="hard", distillation_alpha=0.3)
    hard = -STUDENT.log_softmax(1)[[0, 1], [1, 1]].mean()
    expected = 0.7 * 1.25 + 0.3 * hard
    torch.testing.assert_close(compute_distillation(recipe, torch.tensor(1.25), STUDENT, TEACHER), expected)


def test_teacher_stays_as_it_is_and_out_of_the_checkpoint(
    recipe: Recipe, pictures: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watch(*arguments):
        seen.append(create_teacher(*arguments))
        return seen[-1]

    monkeypatch.setattr("fasternet.train.classification.create_teacher", watch)
    outputs = {}
    for name, fields in {"plain": {}, "soft": {"teacher": str(teacher)}}.items():
        changed = dataclasses.replace(recipe, epochs=1, **fields)
        train("fasternet_t0", str(pictures), tmp_path / name, recipe=changed, model_options=TINY_MODEL, device="cpu")
        outputs[name] = safetensors.torch.load_file(tmp_path / name / "last" / "model.safetensors")
    assert seen[0] is None
    assert not seen[1].training
    assert not any(parameter.requires_grad for parameter in seen[1].parameters())
    fresh = create_teacher(dataclasses.replace(recipe, teacher=str(teacher)), NAMES, Preprocessing())
    torch.testing.assert_close(seen[1].state_dict(), fresh.state_dict(), rtol=0, atol=0)
    assert set(outputs["plain"]) == set(outputs["soft"])
    assert not torch.equal(outputs["plain"]["classifier.weight"], outputs["soft"]["classifier.weight"])


@pytest.mark.parametrize(
    ("names", "message"),
    [("abcde", r"teacher=.*teacher has 2 classes, the data 5"), (("dark", "light"), "knows other classes")],
)
def test_teacher_of_other_classes_is_refused(recipe: Recipe, teacher: Path, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_teacher(dataclasses.replace(recipe, teacher=str(teacher)), names, Preprocessing())


def test_teacher_sees_pictures_normalized_as_it_learned_them() -> None:
    own, student = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), Preprocessing()
    pixels = torch.rand(2, 3, 8, 8)
    normalized = [
        (pixels - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None] for p in (own, student)
    ]
    seen = Teacher(torch.nn.Identity(), own, student)(normalized[1])
    torch.testing.assert_close(seen, normalized[0], rtol=1e-5, atol=1e-5)


def test_teacher_that_cannot_take_the_pictures_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    original = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, **o: original(name, pretrained=False, **o))
    changed = dataclasses.replace(recipe, teacher="deit_tiny_patch16_224", input_size=224, train_scale=0.75)
    with pytest.raises(
        ValueError, match=r"teacher=deit_tiny_patch16_224 cannot take pictures of 224 pixels|168 pixels"
    ):
        create_teacher(dataclasses.replace(changed, epochs=2, full_size_epochs=1), [""] * 1000, Preprocessing())


def test_teacher_may_be_any_network_of_timm(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked = []
    original = timm.create_model

    def create(name: str, pretrained: bool, **options):
        asked.append((name, pretrained))
        return original(name, pretrained=False, **options)

    monkeypatch.setattr("timm.create_model", create)
    network = create_teacher(
        dataclasses.replace(recipe, teacher="mobilenetv2_050", input_size=32), [""] * 1000, Preprocessing()
    )
    assert asked == [("mobilenetv2_050", True)]
    assert not network.training
    with pytest.raises(ValueError, match="recipe field teacher=regnety_16 is no model or run folder"):
        create_teacher(dataclasses.replace(recipe, teacher="regnety_16"), [""] * 1000, Preprocessing())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "augreg_in21k has 21843 classes, the data 1000$"),
        ("vit_small_patch14_dinov2.lvd142m", "the published weights of vit_small_patch14_dinov2 have no classifier$"),
    ],
)
def test_teacher_whose_published_classifier_is_another_one_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """A head of the data's size would be random."""
    import timm

    original = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, **o: original(name, pretrained=False, **o))
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_teacher(dataclasses.replace(recipe, teacher=name), [""] * 1000, Preprocessing())


def test_teacher_that_cannot_be_downloaded_is_one_sentence_about_the_teacher(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", refuse)
    message = (
        r"^recipe field teacher=resnet18: cannot download the weights of resnet18 \(no route to host\): "
        "without a network, give a model folder$"
    )
    with pytest.raises(ConnectionError, match=message):
        create_teacher(dataclasses.replace(recipe, teacher="resnet18"), [""] * 1000, Preprocessing())


def test_teacher_is_a_folder_and_no_file(recipe: Recipe, teacher: Path, tmp_path: Path) -> None:
    found = create_teacher(dataclasses.replace(recipe, teacher=f"local-dir:{teacher}"), NAMES, Preprocessing())
    plain = create_teacher(dataclasses.replace(recipe, teacher=str(teacher)), NAMES, Preprocessing())
    torch.testing.assert_close(found.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for name in (str(teacher / "model.safetensors"), "hf-hub:me/flowers"):
        with pytest.raises(ValueError, match=f"^recipe field teacher={name}: give a model folder; timm's save_for_hf"):
            create_teacher(dataclasses.replace(recipe, teacher=name), NAMES, Preprocessing())
    with pytest.raises(ValueError, match=r"^recipe field teacher=.* is no model or run folder, .*holds no model\.safe"):
        create_teacher(dataclasses.replace(recipe, teacher=str(tmp_path)), NAMES, Preprocessing())


def test_teacher_cannot_be_put_into_training_mode(recipe: Recipe, teacher: Path) -> None:
    found = create_teacher(dataclasses.replace(recipe, teacher=str(teacher)), NAMES, Preprocessing())
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    torch.nn.Sequential(found).train()(torch.randn(4, 3, 32, 32))
    assert not any(module.training for module in found.modules())
    torch.testing.assert_close(found.state_dict(), before, rtol=0, atol=0)
