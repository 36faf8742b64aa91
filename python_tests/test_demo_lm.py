"""The language model demo: its text, its tokens, its loss, and a tiny run from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from tgt_fast import cli
from tgt_fast.demos.lm import corpus, data, findings, memory, page, results, run, settings, students, teachers, tune
from tgt_fast.demos.lm.bpe import Tokenizer, train_tokenizer
from tgt_fast.demos.lm.models import LanguageModel
from tgt_fast.demos.lm.results import DemoResult
from tgt_fast.demos.lm.settings import METHODS, Settings
from tgt_fast.demos.lm.training import bits_per_byte, next_token_loss
from tgt_fast.errors import ArgumentError, TgtError

TINY = Settings(
    tokens=300, tokenizer_bytes=60_000, train_bytes=120_000, module_bytes=2_000, length=16, few=24, validation=6,
    test=6, teacher_width=16, teacher_layers=2, teacher_heads=2, teacher_steps=3, width=8, heads=2, steps=14,
    one_hot_steps=8, batch=4, k=7, evaluations=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def library() -> corpus.Corpus:
    return corpus.load_corpus()


@pytest.fixture(scope="module")
def text(library: corpus.Corpus) -> data.Text:
    return data.make_text(library, TINY)


@pytest.fixture(scope="module")
def tiny(library: corpus.Corpus) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peaks", lambda: {"linear": 1, "logits": 2, "eager": 3})
        return run.run_demo((1, 0), TINY, corpus=library, workers=0)


def test_modules_are_in_one_part_each(library: corpus.Corpus) -> None:
    parts = [library.train, library.validation, library.test]
    names = [module.name for part in parts for module in part]
    assert len(set(names)) == len(names)
    assert all(len(part) >= 5 for part in parts)
    texts = [{line for module in part for line in module.text.splitlines() if len(line) > 60} for part in parts]
    shared = texts[0] & texts[2]
    assert len(shared) < 0.02 * len(texts[2]), sorted(shared)[:20]  # a licence, an idiom
    assert library == corpus.load_corpus()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("_pydecimal.py", "decimal"), ("decimal.py", "decimal"), ("json", "json"), ("_pyio.py", "io")],
)
def test_variants_of_a_module_are_one_family(name: str, expected: str) -> None:
    assert corpus.family(name) == expected


def test_a_library_without_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("pass")
    with pytest.raises(ArgumentError, match="standard library's source"):
        corpus.load_corpus(tmp_path)


def test_tokens_give_every_text_back() -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 20, "naïve 文\t  \n"], 290)
    assert 256 < len(tokenizer) <= 290
    for sample in ("def g(x):\n    return f(x)  # ok\n", "naïve 文字 \U0001f600 __init__ a_b9\r\n\t\n", ""):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert len(tokenizer.encode("def f(x):\n    return x\n")) < 12


def test_merges_are_those_of_counting_all_pairs_anew() -> None:
    """The pairs' counts are kept up to date merge by merge; here they are counted from nothing each time."""
    words = ["low", "lower", "lowest", "newer", "wider", "new", "aaaa", "aaa"]
    times = [5, 2, 3, 6, 3, 2, 4, 3]
    sample = " ".join(word for word, count in zip(words, times, strict=True) for _ in range(count))
    pieces = [" " + word for word in sample.split()]
    pieces[0] = pieces[0][1:]
    expected: list[tuple[int, int]] = []
    tokens = [list(piece.encode()) for piece in pieces]
    while len(expected) < 12:
        counts: dict[tuple[int, int], int] = {}
        for word in tokens:
            for pair in zip(word, word[1:]):  # noqa: B905, RUF007
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        made = 256 + len(expected)
        expected.append(best)
        for number, word in enumerate(tokens):
            merged: list[int] = []
            for token in word:
                if merged and (merged[-1], token) == best:
                    merged[-1] = made
                else:
                    merged.append(token)
            tokens[number] = merged
    assert train_tokenizer([sample], 256 + 12).merges == tuple(expected)


def test_windows_stay_within_a_text() -> None:
    letters = Tokenizer(())
    found = data.windows(letters, ["abcdefgh", "xy", "1234567"], length=3)
    assert [bytes(row).decode() for row in found.tokens.tolist()] == ["abcd", "defg", "1234", "4567"]
    assert torch.equal(found.x[:, 1:], found.y[:, :-1])
    fewer = data.windows(letters, ["abcdefgh", "1234567"], length=3, most=2)
    assert [bytes(row).decode() for row in fewer.tokens.tolist()] == ["abcd", "1234"]


def test_batches_show_every_window_once_an_epoch(text: data.Text) -> None:
    few = data.few_windows(text, TINY, seed=3)
    assert len(few) == 24
    batches = data.Batches(few, 4, count=12, seed=0)
    ids = [batch[0].tolist() for batch in batches]
    first, second = (sorted(i for batch in ids[start : start + 6] for i in batch) for start in (0, 6))
    assert first == second == list(range(24))
    assert ids[:6] != ids[6:]
    assert all(torch.equal(x, few.x[i]) and torch.equal(y, few.y[i]) for i, x, y in batches)
    assert not torch.equal(few.tokens, data.few_windows(text, TINY, seed=4).tokens)


def test_the_model_looks_back_alone() -> None:
    torch.manual_seed(0)
    model = LanguageModel(50, 8, 16, 2, 2)
    for parameter in model.parameters():  # its blocks begin as the identity
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(50, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amin(dim=(0, 2)).gt(0).all()


def test_the_loss_without_a_teacher_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 3, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    y = torch.randint(11, (2, 3))
    ours = next_token_loss(hidden, head, y)
    expected = F.cross_entropy((hidden @ head.T).flatten(0, 1), y.flatten())
    torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad(ours, (hidden, head))
    for made, right in zip(grads, torch.autograd.grad(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(made, right)


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    """An even guess among 256 tokens costs 8 bits each; tokens of two bytes cost half of that a byte."""
    model = LanguageModel(256, 4, 8, 1, 2)
    torch.nn.init.zeros_(model.embedding.weight)
    windows = data.Windows(torch.randint(256, (20, 5)))
    assert bits_per_byte(model, windows, torch.ones(256, dtype=torch.int64)) == pytest.approx(8, rel=1e-6)
    assert bits_per_byte(model, windows, torch.full((256,), 2)) == pytest.approx(4, rel=1e-6)


def test_a_record_does_not_depend_on_its_batch(text: data.Text) -> None:
    torch.manual_seed(0)
    recorder = teachers.Recorder(teachers.teacher_model(TINY), TINY.k, 2.0, TINY.tail)
    x = text.train.x[:6]
    together, apart = recorder(x), [recorder(x[i : i + 1]) for i in range(6)]
    assert torch.equal(together.log_probs, torch.cat([record.log_probs for record in apart]))
    assert together.ids.shape == (6, TINY.length, TINY.k)
    assert together.temperature == 2.0


def test_a_tiny_run_has_everything(tiny: DemoResult) -> None:
    assert [(s.method, s.seed) for s in tiny.students] == [(m, seed) for m in METHODS for seed in (1, 0)]
    for student in tiny.students:
        assert math.isfinite(student.bits_per_byte)
        assert student.bits_per_byte < student.before
        assert [step for step, _ in student.curve] == [0, student.steps // 2, student.steps]
        assert (student.cache_bytes > 0) == (student.method == "distillation-cached")
        assert student.windows == (tiny.text.train_windows if "plenty" in student.method else 24)
    starts = {s.before for s in tiny.students if s.seed == 0}
    assert len(starts) == 1  # every method begins with the same weights
    assert tiny.teacher.bits_per_byte < tiny.teacher.before


def test_a_student_cannot_tell_a_cache_from_records_made_again(tiny: DemoResult) -> None:
    assert tiny.cache_is_exact
    for fresh, cached in zip(tiny.of(results.RECORDS), tiny.of(results.CACHED), strict=True):
        assert fresh.curve == cached.curve  # 14 steps of 6 an epoch, shuffled
    assert tiny.numbers(results.RECORDS, "bits_per_byte") != tiny.numbers("distillation", "bits_per_byte")


def test_the_numbers_do_not_depend_on_processes(
    tiny: DemoResult, library: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peaks", dict)
    again = run.run_demo((0,), TINY, corpus=library, workers=1)
    assert [s.curve for s in again.students] == [s.curve for s in tiny.students if s.seed == 0]


def test_memory_is_compared_of_the_same_loss() -> None:
    torch.manual_seed(0)
    ours, head, theirs, their_head = (torch.randn(rows, 6) for rows in (9, 40, 9, 40))
    linear, logits, eager = (memory._loss(way)(ours, head, theirs, their_head) for way in memory.WAYS)
    torch.testing.assert_close(linear, eager)
    torch.testing.assert_close(logits, eager)


def test_json_has_the_promised_form(tiny: DemoResult) -> None:
    content = json.loads(json.dumps(results.as_json(tiny)))
    assert set(content) >= {"methods", "teacher", "versions", "seeds", "commit"}
    assert list(content["methods"]) == list(METHODS)
    for method, entry in content["methods"].items():
        assert set(entry) >= {"bits_per_byte", "before", "seconds", "step_ms", "cache_bytes"}
        assert entry["bits_per_byte"]["per_seed"] == [s.bits_per_byte for s in tiny.of(method)]
    assert content["seeds"] == [1, 0]


def test_the_page_shows_every_plot(tiny: DemoResult, tmp_path: Path) -> None:
    html = page.write_page(tiny, tmp_path).read_text(encoding="utf-8")
    names = ["bits", "learning", "memory", "steps"]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == names
    assert html.count("data:image/png;base64,") == len(names)
    for label in findings.LABELS.values():
        assert label in html
    (tmp_path / "x").mkdir()
    page.write_page(replace(tiny, memory=None), tmp_path / "x")
    assert not (tmp_path / "x" / "memory.png").exists()


def test_findings_say_what_helped_and_what_did_not(tiny: DemoResult) -> None:
    def with_bits(method: str, values: dict[int, float]) -> DemoResult:
        changed = [replace(s, bits_per_byte=values[s.seed]) if s.method == method else s for s in tiny.students]
        return replace(tiny, students=tuple(changed))

    base = with_bits("one-hot", {s.seed: s.bits_per_byte + 0.25 for s in tiny.of("distillation")})
    assert "gained 0.250 bits per byte, in each of 2 seeds" in findings.findings(base)[0]
    worse = with_bits("one-hot", {s.seed: s.bits_per_byte - 0.5 for s in tiny.of("distillation")})
    assert "lost 0.500 bits per byte, in each of 2 seeds: it did not help" in findings.findings(worse)[0]
    assert "equally good to the last digit" in findings.findings(tiny)[3]
    apart = with_bits(results.CACHED, {s.seed: s.bits_per_byte + 1e-3 for s in tiny.of(results.RECORDS)})
    assert "differ by up to 0.001000 bits per byte" in findings.findings(apart)[3]


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_make_no_run_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="seeds"):
        run.run_demo(seeds, TINY, workers=0)


def test_tuning_ranks_choices_on_the_validation_text(library: corpus.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    train_student = students.train_student

    def watched(method: str, teacher: Any, text: data.Text, judge: data.Windows, *rest: Any) -> Any:
        judged.append(int(judge is text.validation))
        return train_student(method, teacher, text, judge, *rest)

    monkeypatch.setattr(tune, "train_student", watched)
    found = tune.tune(["one-hot-plenty"], [5, 6], workers=0, base=replace(TINY, steps=2), corpus=library)
    assert judged == [1] * 6
    ranked = [row["bits_per_byte"] for row in found["one-hot-plenty"]]
    assert ranked == sorted(ranked)


def test_every_group_of_tuning_contains_the_chosen_settings() -> None:
    base = Settings()
    for group in tune.GROUPS:
        assert any(trial.settings == base for trial in tune.trials(group, base)), group


def test_the_command_line_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[list[int], bool]] = []

    def stop(seeds: Any, chosen: Settings, *, progress: Any) -> None:
        asked.append((list(seeds), chosen.steps < Settings().steps))
        raise TgtError("stopped")

    monkeypatch.setattr(run, "run_demo", stop)
    for arguments in ([], ["--quick"], ["--seeds", "4,2"]):
        assert cli.main(["demo", "lm", "--out", str(tmp_path), *arguments]) == 1
    assert asked == [([0, 1, 2], False), ([0], True), ([4, 2], False)]
    capsys.readouterr()


def test_a_tiny_demo_from_the_command_line(
    library: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "quick", lambda _: replace(TINY, steps=3, one_hot_steps=3))
    monkeypatch.setattr(memory, "peaks", lambda: None)
    monkeypatch.setattr(run, "run_demo", partial(run.run_demo, corpus=library, workers=0))
    file = tmp_path / "numbers" / "x.json"
    assert cli.main(["demo", "lm", "--quick", "--out", str(tmp_path / "r"), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "distillation, cache" in out
    assert "students: 6 of 6" in out
    assert (tmp_path / "r" / "index.html").stat().st_size > 50_000
    assert set(json.loads(file.read_text())["methods"]) == set(METHODS)
