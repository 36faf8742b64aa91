"""DistillationTrainer, with the real transformers, accelerate and peft."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import integrations_kit as kit
import pytest
import torch
import torch.nn.functional as F
from integrations_kit import _quick_trainers, arguments, assert_close, batch, gradients, llama, made, rows, transformers
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, ShapeError, UnknownIdError
from tgt_fast.integrations.transformers import DistillationTrainer
from tgt_fast.integrations.transformers.heads import VocabularyHead

__all__ = ["_quick_trainers"]  # for each test

FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},  # a tied head, no word of a loss
    "Gemma2ForCausalLM": {"final_logit_softcapping": 2.0, "head_dim": 8, "num_key_value_heads": 1},
    "CohereForCausalLM": {"logit_scale": 0.25},
    "GraniteForCausalLM": {"logits_scaling": 6.0},
    "PhiForCausalLM": {},  # a bias
    "OPTForCausalLM": {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
    "BertForMaskedLM": {"max_position_embeddings": 16},
    "ModernBertForMaskedLM": {"max_position_embeddings": 16, "cls_token_id": 1, "sep_token_id": 2},
}
TEACHER_SAYS = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)


def by_hand(student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor], shifts: bool, **loss: Any) -> Tensor:
    labels = inputs["labels"]
    given = {name: part for name, part in inputs.items() if name != "labels"}
    logits, said = student(**given).logits, teacher(**given).logits.detach()
    if shifts:
        logits, said, labels = logits[:, :-1], said[:, :-1], labels[:, 1:]
    options = {"temperature": 2.0, "hard_weight": 1.0, **loss}
    return tgt.distillation_loss(logits, said, labels, backend="reference", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_family_is_met_and_its_logits_are_not_made(family: str) -> None:
    model, teacher = made(family, **FAMILIES[family]), made(family, seed=1, **FAMILIES[family])
    inputs = batch(rows(4))
    expected = by_hand(model, teacher, inputs, shifts="Masked" not in family)
    expected.backward()
    by_logits = gradients(model)

    trainer = DistillationTrainer(model, arguments(), teacher=teacher)
    widths: list[int] = []
    layer = model.get_output_embeddings()
    loss = trainer.compute_loss(model, dict(inputs))  # the first batch looks at the head
    layer.register_forward_hook(lambda *seen: widths.append(seen[2].shape[-1]))
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert_close(gradients(model), by_logits)
    assert len(widths) == 1
    assert widths[0] < kit.VOCABULARY
    assert "forward" not in layer.__dict__


def test_what_no_matrix_scale_and_softcap_can_say_is_refused() -> None:
    class Masked(transformers.LlamaForCausalLM):
        def forward(self, *given: Any, **named: Any) -> Any:
            outputs = super().forward(*given, **named)
            outputs.logits = outputs.logits.clamp(max=1.0)
            return outputs

    class Skipping(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **named: Any) -> Any:
            hidden = self.model(input_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    class Wavy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sin()

    config, inputs, teacher = llama().config, batch(rows(2)), llama(seed=1)
    wavy = llama()
    wavy.lm_head = Wavy(16, kit.VOCABULARY, bias=False)
    for model, reason in (
        (Masked(config), "no scale and softcap"), (Skipping(config), "does not call the head"), (wavy, "more than a"),
    ):  # fmt: skip
        trainer = DistillationTrainer(model, arguments(), teacher=teacher)
        with pytest.raises(ArgumentError, match=reason) as refused:
            trainer.compute_loss(model, dict(inputs))
        assert 'loss="logits"' in str(refused.value)
        other = DistillationTrainer(llama(), arguments(), teacher=model)
        with pytest.raises(ArgumentError, match=f"the teacher.*{reason}"):
            other.compute_loss(other.model, dict(inputs))
        with_logits = DistillationTrainer(model, arguments(), teacher=teacher, loss="logits")
        assert with_logits.compute_loss(model, dict(inputs)).isfinite()
    with pytest.raises(ArgumentError, match="no vocabulary head"):
        DistillationTrainer(nn.Linear(2, 2), arguments(), teacher=teacher)


@pytest.mark.parametrize("adapted", ["lm_head", "modules_to_save", "dora", "dropout"])
def test_adapters_on_the_body_and_on_the_head(adapted: str) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "r": 4, "init_lora_weights": False}
    if adapted == "modules_to_save":
        options |= {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    options |= {"use_dora": adapted == "dora", "lora_dropout": 0.1 if adapted == "dropout" else 0.0}
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    inputs, teacher = batch(rows(4)), llama(seed=1)
    trainer = DistillationTrainer(model, arguments(), teacher=teacher)
    if adapted in ("dora", "dropout"):
        with pytest.raises(ArgumentError, match="dropout" if adapted == "dropout" else "in its head that its matrix"):
            trainer.compute_loss(model, dict(inputs))
        return
    expected = by_hand(model, teacher, inputs, shifts=True)
    expected.backward()
    by_logits = gradients(model)
    assert any("lm_head" in name for name in by_logits)
    assert any("q_proj" in name for name in by_logits)
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert_close(gradients(model), by_logits)


def trained(loss: Any = "linear", *, steps: int = 2, seed: int = 3, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Weights after some steps on the same 16 rows each, and the trainer."""
    model, teacher = llama(8, seed), llama(seed=1)
    data = rows(16, seed=seed)
    args = arguments(max_steps=steps, train_sampling_strategy="sequential", **options)
    trainer = DistillationTrainer(model, args, train_dataset=data, eval_dataset=data, teacher=teacher, loss=loss)
    trainer.train()
    return {name: value.clone() for name, value in model.state_dict().items()}, trainer


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_accumulation_counts_the_rows_of_a_step_and_an_evaluation_those_of_its_own(loss: str) -> None:
    whole, one = trained(loss, per_device_train_batch_size=16)
    split, four = trained(loss, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert_close(split, whole)
    for entry, other in zip(one.state.log_history[:2], four.state.log_history[:2], strict=True):
        for name in ("loss", "soft", "hard"):
            assert entry[name] == pytest.approx(other[name], rel=1e-4)
        assert entry["soft"] + entry["hard"] == pytest.approx(entry["loss"], rel=1e-5)
        assert min(entry["soft"], entry["hard"]) > 0
    # With lr 0 an evaluation in batches of any size gives the loss that the step had.
    _, still = trained(loss, steps=1, learning_rate=0.0, per_device_train_batch_size=16, per_device_eval_batch_size=5)
    assert still.evaluate()["eval_loss"] == pytest.approx(still.state.log_history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_loss_of_ones_own_and_its_terms(kind: str, linear: bool) -> None:
    make = tgt.LinearDistillationLoss if linear else tgt.DistillationLoss
    loss = make(kind, temperature=3.0, teacher_temperature=1.5, soft_weight=0.7, hard_weight=0.4)
    student, teacher, inputs = llama(8), llama(seed=1), batch(rows(4))
    trainer = DistillationTrainer(student, arguments(), teacher=teacher, loss=loss)
    student.train()
    value = trainer.compute_loss(student, dict(inputs), num_items_in_batch=torch.tensor(20))
    options = {"divergence": kind, "temperature": 3.0, "teacher_temperature": 1.5, "normalizer": 20}
    soft = by_hand(student, teacher, inputs, True, **options, soft_weight=0.7, hard_weight=0.0)
    hard = by_hand(student, teacher, inputs, True, **options, soft_weight=0.0, hard_weight=0.4)
    torch.testing.assert_close(value, soft + hard)
    assert float(trainer._terms["soft"]) == pytest.approx(soft.item(), rel=1e-4)
    assert float(trainer._terms["hard"]) == pytest.approx(hard.item(), rel=1e-4)


def test_records_are_read_by_id_although_unused_columns_are_removed(tmp_path: Path) -> None:
    student, teacher, data = llama(8), llama(seed=1), rows(6)
    cache = tgt.TeacherCache(tmp_path, k=5, version="1")
    args = arguments(max_steps=1, per_device_train_batch_size=6, learning_rate=0.0)
    assert args.remove_unused_columns
    first = DistillationTrainer(student, args, train_dataset=data, teacher=teacher, cache=cache, id_column="id")
    first.train()
    assert cache.ids().tolist() == list(range(6))
    again = DistillationTrainer(student, args, train_dataset=data, cache=cache, id_column="id")
    again.train()
    assert again.state.log_history[0]["loss"] == first.state.log_history[0]["loss"]
    inputs = batch(data)
    with torch.no_grad():
        said = cache.read(torch.arange(6))
        labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        expected = TEACHER_SAYS(student(inputs["input_ids"]).logits, said, labels)
    assert again.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    lacking = DistillationTrainer(student, args, train_dataset=rows(7), cache=cache, id_column="id")
    with pytest.raises(UnknownIdError):
        lacking.compute_loss(student, {**batch(rows(7)), "id": torch.arange(7)})
    unnamed = DistillationTrainer(student, args, train_dataset=data, cache=cache)
    with pytest.raises(ArgumentError, match="id_column"):
        unnamed.train()


def test_under_autocast_the_heads_multiply_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    matrix = VocabularyHead.matrix

    def watched(self: VocabularyHead, hidden: Tensor) -> Any:
        found = matrix(self, hidden)
        seen.extend(part.dtype for part in found if part is not None)
        return found

    monkeypatch.setattr(VocabularyHead, "matrix", watched)
    whole, _ = trained(steps=1)
    assert set(seen) == {torch.float32}
    seen.clear()
    half, trainer = trained(steps=1, bf16=True)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 4  # of teacher and student
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_two(), rel=0.02)


def by_two() -> float:
    """The first loss of ``trained`` in one batch of 8."""
    inputs = batch(rows(16, seed=3)[:8])
    return by_hand(llama(8, 3), llama(seed=1), inputs, shifts=True).item()


def test_classifiers_of_texts_and_images_with_a_teacher_of_either_kind() -> None:
    student, other = (made("BertForSequenceClassification", 16, seed, num_labels=4) for seed in (0, 1))
    inputs = {"input_ids": torch.randint(3, 40, (5, 6)), "labels": torch.tensor([0, 1, -1, 3, -100])}

    def label(x: dict[str, Tensor]) -> Tensor:
        return other(**x).logits

    expected = TEACHER_SAYS(student(inputs["input_ids"]).logits, other(inputs["input_ids"]).logits, inputs["labels"])
    identity = nn.Identity()
    for teacher in (other, tgt.Teacher(identity, identity, label, modules=[other])):
        trainer = DistillationTrainer(student, arguments(), teacher=teacher)
        loss = trainer.compute_loss(student, dict(inputs), num_items_in_batch=torch.tensor(4))
        torch.testing.assert_close(loss, expected)
    sizes = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    vit, big = (made("ViTForImageClassification", width, **sizes) for width in (8, 16))
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 3} for n in range(4)]
    trainer = DistillationTrainer(vit, arguments(max_steps=1), train_dataset=data, eval_dataset=data, teacher=big)
    trainer.train()
    assert trainer.predict(data).predictions.shape == (4, 3)
    assert not any(parameter.requires_grad for parameter in big.parameters())
    unlabelled = [{"pixel_values": one["pixel_values"]} for one in data]
    args = arguments(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = DistillationTrainer(vit, args, train_dataset=unlabelled, teacher=big)
    trainer.train()  # of equal batches the mean of means
    entry = trainer.state.log_history[0]
    assert entry["hard"] == 0
    assert entry["soft"] == pytest.approx(entry["loss"], rel=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = llama(8), llama(seed=1)

    def refused(match: str, *given: Any, **options: Any) -> None:
        with pytest.raises(ArgumentError, match=match):
            DistillationTrainer(student, given[0] if given else arguments(), **options)

    refused("give a teacher, or a cache")
    refused("model of transformers", teacher=lambda x: x)
    refused("is the student", teacher=student)
    refused("must be a tgt_fast.TeacherCache", teacher=teacher, cache={})
    refused("loss must be", teacher=teacher, loss="kl")
    refused("reduction='mean'", teacher=teacher, loss=tgt.DistillationLoss(reduction="sum"))
    refused("compute_loss_func", teacher=teacher, compute_loss_func=lambda *x: 0)
    refused("label_smoothing", arguments(label_smoothing_factor=0.1), teacher=teacher)
    said = tgt.LinearDistillationLoss(hard_weight=1.0, student_softcap=30.0)
    trainer = DistillationTrainer(student, arguments(), teacher=teacher, loss=said)
    with pytest.raises(ArgumentError, match=r"student_softcap=30\.0, but the model's is None"):
        trainer.compute_loss(student, batch(rows(2)))
    with pytest.raises(ArgumentError, match="there are none"):
        trainer.compute_loss(student, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})
    trainer = DistillationTrainer(student, arguments(), teacher=teacher)
    with pytest.raises(ShapeError, match="do not fit the labels"):
        trainer.compute_loss(student, {**batch(rows(2)), "labels": torch.ones(2, 5, dtype=torch.int64)})
    nothing = {**batch(rows(2)), "labels": torch.full((2, 6), -100)}
    assert float(trainer.compute_loss(student, nothing, num_items_in_batch=torch.tensor(0))) == 0.0
    assert math.isfinite(trainer.evaluate(rows(3))["eval_loss"])
