"""The retrieval demo: pairs, batches, students, and a tiny run from end to end on texts made here."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from tgt_fast import cli
from tgt_fast.demos.artifacts import Artifacts
from tgt_fast.demos.catalog import DEMOS
from tgt_fast.demos.corpus import Corpus, Entry
from tgt_fast.demos.retrieval import data, findings, methods, page, results, run, settings, teachers, tune
from tgt_fast.demos.retrieval.data import Labelled, Vectors
from tgt_fast.demos.retrieval.results import DemoResult
from tgt_fast.demos.retrieval.settings import METHODS, Settings, StudentSettings
from tgt_fast.demos.text.generator import GeneratorSettings
from tgt_fast.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(
    labels=12, uniform=7, length=12, vocabulary=60, variants=2, width=8, heads=2, vector=8, steps=4, texts=16,
    evaluations=2, generator=GeneratorSettings(max_length=12, width=16, hidden=16, head_width=8, batch=8, steps=2),
)  # fmt: skip
VERBS, NOUNS = ("sorts", "finds", "joins", "splits"), ("lists", "trees", "words", "rows", "graphs")
ENDS = ("fast", "slow")


def corpus() -> Corpus:
    """Three splits of texts that all differ in their words."""
    parts: dict[str, list[Entry]] = {"train": [], "validation": [], "test": []}
    for k, (verb, noun, end) in enumerate(itertools.product(VERBS, NOUNS, ENDS)):
        for name, rows in parts.items():
            summary = f"{name} {verb} the {noun} in a {end} way"
            rest = f"it is the {name} that {verb} all {noun} and it does so in a {end} way number {k}"
            rows.append(Entry("pack", f"pack.{name}", f"f{k}", "pack", summary, rest))
    return Corpus(*(tuple(rows) for rows in parts.values()))


class StandIn(nn.Module):
    """In the place of the sentence encoder: mean embeddings of random numbers, on a vocabulary of words."""

    def __init__(self) -> None:
        super().__init__()
        from tgt_fast.demos.text.vocabulary import SPECIAL, word_pieces

        words = {word for part in (corpus().train, corpus().test) for e in part for word in e.text.split()}
        self.tokenizer = word_pieces([*SPECIAL, *sorted(words)], 64)
        torch.manual_seed(0)
        self.table = nn.Embedding(len(words) + len(SPECIAL), 384)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        real = inputs["attention_mask"][..., None]
        made = (self.table(inputs["input_ids"]) * real).sum(1) / real.sum(1).clamp_min(1)
        return nn.functional.normalize(made, dim=1).detach()

    def embed(self, texts: tuple[str, ...], max_length: int) -> Tensor:
        made = self.tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        return self(made)


@pytest.fixture(scope="module")
def stand_in() -> Any:
    encoder = StandIn().eval()
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, teachers):
            patch.setattr(module, "sentence_encoder", lambda: encoder)
        patch.setattr(run, "sentence_tokenizer", lambda: encoder.tokenizer)
        yield encoder


@pytest.fixture(scope="module")
def tiny(stand_in: StandIn) -> DemoResult:
    return run.run_demo((1, 0), TINY, corpus=corpus(), workers=0)


def test_pairs_have_one_answer_each() -> None:
    whole = corpus()
    again = Entry("pack", "pack.train", "g", "pack", whole.test[0].summary, "x" * 70)
    short = Entry("pack", "pack.train", "h", "pack", "Something else entirely", "too short")
    splits = data.splits_of(Corpus((*whole.train, again, short), whole.validation, whole.test))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 40, 40]
    assert not {*splits.train.queries, *splits.train.passages} & {*splits.test.queries, *splits.test.passages}
    assert splits.test.queries[0] == whole.test[0].summary
    with pytest.raises(ArgumentError, match="pairs for training"):
        data.splits_of(Corpus(whole.train, whole.validation, whole.test[:3]))


def test_fewer_labels_are_among_the_more() -> None:
    pairs = data.splits_of(corpus()).train
    assert torch.equal(data.chosen_pairs(pairs, 5, 3), data.chosen_pairs(pairs, 9, 3)[:5])
    assert not torch.equal(data.chosen_pairs(pairs, 9, 3), data.chosen_pairs(pairs, 9, 4))


def vectors(count: int, first: int = 0) -> Vectors:
    """Texts that are told apart by their first token."""
    ids = torch.full((count, 4), 3)
    ids[:, 0] = torch.arange(count) + first
    return Vectors(ids, torch.nn.functional.normalize(torch.randn(count, 6), dim=1))


LABELLED = Labelled(vectors(10, 100), vectors(10, 200))


@pytest.mark.parametrize("method", METHODS)
def test_batches_hold_as_many_texts_whatever_the_method(method: str) -> None:
    further = {"tgt-random": vectors(30, 300), "uniform-negatives": vectors(13, 300)}.get(method)
    queries, passages = methods.batch_of(method, LABELLED, further, 20, torch.Generator().manual_seed(0))
    assert len(queries) + len(passages) == 20
    count = len(queries)
    assert count == (10 if further is None else 5)
    asked = queries.ids[:, 0] - 100
    assert torch.equal(passages.ids[:count, 0] - 200, asked)  # passage i is query i's
    rest = passages.ids[count:, 0] - 300
    assert len(rest.unique()) == len(rest)
    if method == "tgt-random":  # two of the three that are made of each
        assert torch.equal(rest // 3, asked.repeat_interleave(2))


def test_no_text_answers_itself() -> None:
    partner, ids = methods.as_pairs(3, 10)
    place = torch.arange(10)
    assert torch.equal(partner[partner], place)
    partners = torch.stack([place, partner], 1).sort(1)[0]
    assert torch.equal((ids == ids[partner][:, None]).nonzero()[:, 1].reshape(10, 2), partners)


def test_students_learn_and_their_results_repeat() -> None:
    students = {"one-hot": StudentSettings(2e-2, 0.05, 0.05, 0.0, 1.0)}
    quickly = replace(TINY, width=16, vector=16, steps=60, dropout=0.0, students=students)
    made = [methods.train_student("one-hot", LABELLED, None, LABELLED, 400, quickly, 3) for _ in range(2)]
    assert made[0].recall == made[1].recall
    assert made[0].curve == made[1].curve
    assert len(made[0].curve) == TINY.evaluations
    assert made[0].recall[1] >= 90.0  # pairs that it was shown
    untrained = methods.measured(methods.new_student(400, TINY), LABELLED)
    assert untrained[1] <= 60.0
    for method, further in (("distillation", vectors(4)), ("tgt-random", None)):
        with pytest.raises(ArgumentError, match="further passages"):
            methods.train_student(method, LABELLED, further, LABELLED, 400, TINY, 0)


def test_a_tiny_run(tiny: DemoResult, tmp_path: Path) -> None:
    assert [(s.method, s.seed) for s in tiny.students] == list(itertools.product(METHODS, (1, 0)))
    assert {s.further for s in tiny.of("tgt-random")} == {24}
    assert {s.further for s in tiny.of("uniform-negatives")} == {7}
    assert all(0.0 <= r <= 100.0 for s in tiny.students for r in s.recall.values())
    assert (tiny.pairs.labelled, tiny.pairs.test) == (12, 40)
    assert tiny.teacher[100] == 100.0  # of 40 passages
    record = json.loads(json.dumps(results.as_json(tiny)))
    for method in METHODS:
        recall = record["methods"][method]["recall"]
        assert recall.keys() == {"1", "20", "100"}
        assert recall["20"] == pytest.approx(tiny.recall(method, 20))
    index = page.write_page(tiny, tmp_path)
    html = index.read_text()
    assert all(findings.LABELS[method] in html for method in METHODS)
    assert tiny.examples[0].query in html
    assert len(findings.findings(tiny)) == 4


def test_synthetic_passages_repeat_and_differ(stand_in: StandIn) -> None:
    prepared = run.prepare(corpus(), TINY, (0,))
    texts = (prepared.unlabelled, prepared.vocabulary, prepared.fingerprint)
    weights = run.generator_task(*texts, TINY, Artifacts(None))
    passages = prepared.tokens["train"].passages.ids[prepared.rows[0]]
    first, second, other = (
        run.explore_task(prepared.vocabulary, weights, passages, TINY, seed) for seed in (0, 0, 1)
    )  # fmt: skip
    assert torch.equal(first.passages.ids, second.passages.ids)
    assert torch.equal(first.passages.teacher, second.passages.teacher)
    assert not torch.equal(first.passages.ids, other.passages.ids)
    assert first.passages.ids.shape == (24, 12)
    assert len(first.texts) == 12
    torch.testing.assert_close(first.passages.teacher.norm(dim=1), torch.ones(24))


def test_what_is_kept_is_used_again(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Artifacts(tmp_path)
    first = run.run_demo((0,), TINY, corpus=corpus(), artifacts=kept, workers=0)
    monkeypatch.setattr(run, "train_generator", None)
    again = run.run_demo((0,), TINY, corpus=corpus(), artifacts=kept, workers=0)
    assert [s.recall for s in first.students] == [s.recall for s in again.students]
    with pytest.raises(TypeError):  # another setting: made anew
        run.run_demo((0,), replace(TINY, vocabulary=50), corpus=corpus(), artifacts=kept, workers=0)


def test_validation_pairs_are_others(stand_in: StandIn) -> None:
    held, test = (run.prepare(corpus(), TINY, (0,), test=name).pairs["test"] for name in ("validation", "test"))
    assert not {*held.queries} & {*test.queries}


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_mean_nothing(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="seeds"):
        run.run_demo(seeds, TINY, corpus=corpus())


def test_the_command(
    tiny: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def run_demo(seeds: Any, chosen: Settings, **options: Any) -> DemoResult:
        asked.update(seeds=seeds, settings=chosen, **options)
        return tiny

    monkeypatch.setitem(DEMOS, "retrieval", replace(DEMOS["retrieval"], packages={}))
    monkeypatch.setattr(run, "run_demo", run_demo)
    file = tmp_path / "out.json"
    words = ["demo", "retrieval", "--quick", "--seeds", "1,0", "--out", str(tmp_path / "r"), "--json", str(file)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "recall@20" in out
    assert "against distillation" in out
    assert set(json.loads(file.read_text())["methods"]) == set(METHODS)
    assert (tmp_path / "r" / "index.html").exists()
    assert asked["seeds"] == [1, 0]
    assert asked["settings"] == settings.quick(Settings())
    lacking = {"a_package_that_does_not_exist": "nothing"}
    monkeypatch.setitem(DEMOS, "retrieval", replace(DEMOS["retrieval"], packages=lacking))
    assert cli.main(["demo", "retrieval", "--out", str(tmp_path / "r")]) != 0
    assert "tgt-fast[text]" in capsys.readouterr().err


def test_tuning_looks_at_validation_pairs_alone(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = run.prepare
    monkeypatch.setattr(run, "prepare", lambda *given: asked.append(given[3]) or plain(*given))
    groups = {
        "distillation": ("distillation", [{"rate": 1e-2}, {"rate": 2e-2}]),
        "noise": ("tgt-random", [{"sigma": 0.5}]),
    }
    monkeypatch.setattr(tune, "GROUPS", groups)
    found = tune.tune(list(groups), (7,), 0, TINY, corpus())
    assert set(asked) == {"validation"}
    assert [len(rows) for rows in found.values()] == [2, 1]
    best, second = (row["recall"] for row in found["distillation"])
    assert best >= second
