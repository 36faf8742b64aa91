"""Fingerprints of teachers that come from other libraries: in silence, equal when loaded again, and honest."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgt_fast as tgt

transformers = pytest.importorskip("transformers")
of = tgt.teacher_fingerprint
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def bert(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **SIZES, **options)
    return transformers.BertForSequenceClassification(config).eval()


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **SIZES)).eval()


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDES.items()}
    config = transformers.BartConfig(vocab_size=20, d_model=16, bos_token_id=0, eos_token_id=2, **sizes)
    return transformers.BartForConditionalGeneration(config).eval()


SIDES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


@pytest.mark.parametrize("make", [bert, llama, bart])
def test_a_transformer_is_seen_in_silence(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    before = of(model)
    assert before.unseen == ()
    assert of(lambda x: model(**x).logits).unseen == ()
    assert before == of(make())
    with torch.no_grad():
        model(input_ids=IDS)
    assert of(model) == before
    model.save_pretrained(tmp_path)
    assert of(model) == before
    assert of(type(model).from_pretrained(tmp_path).eval()) == before
    model.config.use_cache = not model.config.use_cache
    assert of(model) != before


def test_a_tokenizer_in_a_teacher_is_seen() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b"])}

    def make() -> Any:
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")

    def teacher(tokenizer: Any) -> Callable[[list[str]], Tensor]:
        return lambda texts: tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=4)

    tokenizer = make()
    before = of(teacher(tokenizer))
    teacher(tokenizer)(["a", "a b"])  # which leaves padding and truncation as they were asked for
    assert of(teacher(tokenizer)) == before == of(teacher(make()))
    assert before.unseen == ()
    tokenizer.add_tokens(["c"])
    assert of(teacher(tokenizer)) != before


def doubled(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
    return 2 * value.transpose(1, 2), None


def halved(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
    return value.transpose(1, 2) / 2, None


def test_attention_that_the_user_registered_counts() -> None:
    model, registry = bert(), transformers.AttentionInterface
    before = of(model)
    try:
        registry.register("users", doubled)
        one = of(model)
        registry.register("users", halved)
        two = of(model)
    finally:
        registry._global_mapping.pop("users")
    assert len({before, one, two}) == 3
    assert of(model) == before
    assert one.unseen == ()


def test_the_active_adapter_counts() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(bert(), config)
    model.add_adapter("two", config)
    model.set_adapter("two")
    two = of(model)
    model.set_adapter("default")
    one = of(model)
    assert one != two
    assert one.unseen == ()
    with model.disable_adapter():
        assert of(model) not in (one, two)
    assert of(model) == one
    model.set_adapter("two")
    assert of(model) == two


def test_adapters_that_are_loaded_again_are_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)
    model = peft.get_peft_model(bert(), config)
    before = of(model)
    for folder in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(folder)
        assert of(peft.PeftModel.from_pretrained(bert(), folder)) == before
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)
    assert of(model) != before


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_packed_weights_of_a_transformer_count() -> None:
    def packed(change: float) -> Any:
        model = bert()
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.query.weight.mul_(1 + change)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    before = of(packed(0.0))
    assert before == of(packed(0.0)) != of(packed(1.0))
    assert before.unseen == ()


def test_a_lightning_module_is_the_same_with_a_trainer() -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    module = Lit()
    before = of(module)
    module.trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    assert of(module) == before
    assert before.unseen == ()


def test_what_a_diffusers_model_says_of_its_configuration_does_not_count(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    before = of(model)
    assert before.unseen == ()
    model.config["_use_default_values"].reverse()  # out of a set, in another order in each process
    assert of(model) == before
    model.save_pretrained(tmp_path)  # tuples of the configuration come back as lists
    assert of(diffusers.AutoencoderKL.from_pretrained(tmp_path)) == before
    model.register_to_config(scaling_factor=0.5)
    assert of(model) != before


def denoiser() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(attention_head_dim=4, **sizes, **blocks).eval()


def test_a_denoiser_is_the_same_after_it_ran() -> None:
    model = denoiser()
    before = of(model)
    with torch.no_grad():
        model(torch.ones(1, 3, 8, 8), 1)
    assert of(model) == before == of(denoiser())
    assert before.unseen == ()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0"])
def test_a_timm_model_is_seen_in_silence(name: str) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)

    def make(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=3, **options).eval()  # type: ignore[no-any-return]

    def labeler(**options: Any) -> nn.Module:
        return tgt.teacher.TimmLabeler(make(), **options)

    model = make()
    before = of(model)
    with torch.no_grad():
        model(torch.ones(1, 3, 224, 224))
    assert of(model) == before == of(make())
    assert before.unseen == ()
    assert of(labeler()) == of(labeler()) != before
    assert len({of(labeler()), of(labeler(value_range=(-1.0, 1.0))), of(labeler(size=(64, 64)))}) == 3


def test_it_is_equal_in_another_process() -> None:
    """Also of models that keep hashes, which are others in each process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_cache_frameworks as t; "
        "print(*(t.of(make()) for make in (t.llama, t.bart)))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    assert done.stdout.split() == [of(make()) for make in (llama, bart)]


def test_what_accelerate_puts_around_a_model_does_not_count() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = bert()
    before = of(model)
    hooked = accelerate.hooks.add_hook_to_module(bert(), accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert of(hooked) == before
    hooked.bert._old_forward = doubled  # under a hook, another forward than that of the class
    hooked.bert._hf_hook = hooked._hf_hook
    assert of(hooked) != before
    prepared = accelerate.Accelerator(cpu=True).prepare(bert())
    assert of(prepared) == before
    assert before.unseen == ()


def test_a_copy_is_the_same_teacher() -> None:
    model = bert()
    assert of(copy.deepcopy(model)) == of(model)
