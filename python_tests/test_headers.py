"""The shared C++ headers on their own: compiled by the host compiler and run; compiled for a device where nvcc is.

What Python cannot reach through the core is tested here: the scalar forms that a device uses, the merge of row
statistics, and the 16-bit conversions for every bit pattern.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "common/distill.h"
#include "common/latent.h"
#include "common/tokens.h"
using namespace tgt;

static void philox(const char* c0, const char* c1, const char* c2, const char* c3, const char* k0, const char* k1) {
  auto word = [](const char* hex) { return static_cast<uint32_t>(std::strtoul(hex, nullptr, 16)); };
  const Block<uint32_t> b = philox4x32(Block<uint32_t>{word(c0), word(c1), word(c2), word(c3)}, word(k0), word(k1));
  std::printf("%08x %08x %08x %08x\n", b.x0, b.x1, b.x2, b.x3);
}

// Sums over logits [begin, end) of a row pair, relative to their own maxima.
static OnlineSums sums(const double* s, const double* t, int begin, int end, double its, double itt) {
  OnlineSums m;
  for (int j = begin; j < end; ++j) {
    if (s[j] > m.student_max) m.student_max = s[j];
    if (t[j] > m.teacher_max) m.teacher_max = t[j];
  }
  const Mixture<double> none{};
  for (int j = begin; j < end; ++j) {
    Class<double> c;
    c.a = bounded_below((t[j] - m.teacher_max) * itt);
    c.b = bounded_below((s[j] - m.student_max) * its);
    c.p = exp_nonpositive(c.a);
    c.q = exp_nonpositive(c.b);
    m.teacher += c.p;
    m.student += c.q;
    m.hard += exp_nonpositive(bounded_below(s[j] - m.student_max));
    Symmetric::add(c, none, m.x, m.y);
  }
  return m;
}

int main(int argc, char** argv) {
  if (!std::strcmp(argv[1], "philox")) philox(argv[2], argv[3], argv[4], argv[5], argv[6], argv[7]);
  if (!std::strcmp(argv[1], "merge")) {
    double s[64], t[64];
    for (int j = 0; j < 64; ++j) {
      s[j] = 7 * std::sin(3.0 * j);
      t[j] = 5 * std::cos(2.0 * j) + 0.1 * j;
    }
    s[5] = -HUGE_VAL;
    t[5] = -HUGE_VAL;
    const OnlineSums whole = sums(s, t, 0, 64, 0.5, 0.25);
    OnlineSums merged = sums(s, t, 0, 20, 0.5, 0.25);
    merged.merge<Symmetric>(sums(s, t, 20, 50, 0.5, 0.25), 0.5, 0.25);
    merged.merge<Symmetric>(sums(s, t, 50, 64, 0.5, 0.25), 0.5, 0.25);
    merged.merge<Symmetric>(OnlineSums{}, 0.5, 0.25);
    std::printf("%.17g %.17g %.17g %.17g %.17g\n", whole.student, whole.teacher, whole.hard, whole.x, whole.y);
    std::printf("%.17g %.17g %.17g %.17g %.17g\n", merged.student, merged.teacher, merged.hard, merged.x, merged.y);
  }
  if (!std::strcmp(argv[1], "widen")) {
    for (uint32_t b = 0; b < 65536; ++b) {
      const float half = cast<float>(Float16{static_cast<uint16_t>(b)});
      const float brain = cast<float>(BFloat16{static_cast<uint16_t>(b)});
      std::fwrite(&half, 4, 1, stdout);
      std::fwrite(&brain, 4, 1, stdout);
    }
  }
  if (!std::strcmp(argv[1], "narrow")) {
    float x;
    while (std::fread(&x, 4, 1, stdin) == 1) {
      const Float16 half = cast<Float16>(x);
      const BFloat16 brain = cast<BFloat16>(x);
      std::fwrite(&half, 2, 1, stdout);
      std::fwrite(&brain, 2, 1, stdout);
    }
  }
  if (!std::strcmp(argv[1], "gumbel")) {
    uint32_t word;
    while (std::fread(&word, 4, 1, stdin) == 1) {
      const float number = gumbel<float>(word);
      std::fwrite(&number, 4, 1, stdout);
    }
  }
  if (!std::strcmp(argv[1], "exp")) {
    double worst = 0, worst_wide = 0, worst_log = 0;
    for (int i = 0; i < 200000; ++i) {
      const double x = -86.0 * i / 200000;
      const float f = static_cast<float>(x);
      worst = std::fmax(worst, std::fabs(exp_nonpositive(f) / std::exp(static_cast<double>(f)) - 1));
      worst_wide = std::fmax(worst_wide, std::fabs(exp_nonpositive(x) / std::exp(x) - 1));
      const float u = static_cast<float>((i + 0.5) / 200000);
      worst_log = std::fmax(worst_log, std::fabs(log_positive(u) / std::log(static_cast<double>(u)) - 1));
    }
    std::printf("%g %g %g %g\n", worst, worst_wide, worst_log, static_cast<double>(exp_nonpositive(-1e30f)));
  }
}
"""

DEVICE = r"""
#include "common/distill.h"
#include "common/latent.h"
using namespace tgt;
__global__ void every_header(const float* s, const float* t, BFloat16* grad, float* noise) {
  OnlineSums sums;
  sums.raise<Symmetric>(s[0], t[0], 1.0, 1.0);
  OnlineSums other = sums;
  sums.merge<Jsd>(other, 1.0, 1.0);
  const Mixture<float> m{0.5f, 0.5f};
  const float a = t[threadIdx.x], b = s[threadIdx.x];
  const Class<float> c{a, b, exp_nonpositive(a), exp_nonpositive(b)};
  const float g = ForwardKl::d_student(c, m, 0.f, 0.f) + ReverseKl::d_teacher(c, m, 0.f, 0.f) +
                  Jsd::d_student(c, m, 0.f, 0.f) + Tvd::d_teacher(c, m, 0.f, 0.f) +
                  CrossEntropy::d_student(c, m, 0.f, 0.f) + Mse::d_student(c, m, 0.f, 0.f);
  grad[threadIdx.x] = cast<BFloat16>(g + static_cast<float>(sums.student));
  const Block<uint32_t> words = philox4x32(Block<uint32_t>{threadIdx.x, 1, 2, 3}, 4, 5);
  const Pair<float> n = normal_pair<float>(words.x0, words.x1);
  noise[threadIdx.x] = n.first + n.second + truncated_normal(words.x2, 2.0, 0.95);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("headers")
    (folder / "program.cpp").write_text(PROGRAM)
    built = folder / "program"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, str(folder / "program.cpp"), "-o", str(built)], check=True)
    return built


def run(program: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    return subprocess.run([str(program), *arguments], input=stdin, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("counter_and_key", "expected"),
    [
        ("0 0 0 0 0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_scalar_philox_gives_the_published_vectors(program: Path, counter_and_key: str, expected: str) -> None:
    assert run(program, "philox", *counter_and_key.split()).decode().strip() == expected


def test_merged_statistics_equal_those_of_the_whole_row(program: Path) -> None:
    whole, merged = (np.array(line.split(), dtype=float) for line in run(program, "merge").decode().splitlines())
    np.testing.assert_allclose(merged, whole, rtol=1e-13)
    assert (np.abs(whole) > 1e-3).all()


def test_every_sixteen_bit_pattern_widens_exactly(program: Path) -> None:
    values = np.frombuffer(run(program, "widen"), dtype=np.float32).reshape(-1, 2)
    patterns = np.arange(65536, dtype=np.uint32)
    np.testing.assert_array_equal(values[:, 0], patterns.astype(np.uint16).view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(values[:, 1], (patterns << 16).view(np.float32))


def test_narrowing_rounds_to_nearest_even(program: Path) -> None:
    import torch

    generator = np.random.default_rng(0)
    ordinary = generator.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        between = (halves[:-1].astype(np.float64) + halves[1:]) / 2  # ties
        edges = np.array([65519.99, 65520.0, 5.9e-8, 2.98e-8, 3e-8], dtype=np.float32)
        values = np.concatenate([ordinary, halves, between.astype(np.float32), edges])
    words = np.frombuffer(run(program, "narrow", stdin=values.tobytes()), dtype=np.uint16).reshape(-1, 2)
    tensor = torch.from_numpy(values)
    for column, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        expected = tensor.to(dtype).float().numpy()
        ours = torch.from_numpy(words[:, column].astype(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(ours, expected)


def test_elementary_functions_are_accurate_to_a_rounding_or_two(program: Path) -> None:
    narrow, wide, log, underflow = (float(x) for x in run(program, "exp").decode().split())
    assert narrow < 1.5e-7
    assert wide < 1e-15
    assert log < 3e-7
    assert underflow == 0.0


def gumbel_words() -> np.ndarray:
    """Words whose number is largest and smallest, round the middle, where the branches meet, and at random."""
    ends = np.concatenate([np.arange(700), 2**32 - 1 - np.arange(700), 2**31 + np.arange(-300, 300)])
    turns = np.concatenate([int(share * 2**32) + np.arange(-48, 48) for share in (0.5**0.5, 1 - 0.5**0.5, 0.25)])
    return np.concatenate([ends, turns, np.random.default_rng(0).integers(0, 2**32, 4096 - 2288)]).astype(np.uint32)


def exact_gumbels(words: np.ndarray) -> np.ndarray:
    uniform = (words.astype(np.float64) + 0.5) / 2.0**32
    return -np.log(-np.log(uniform))


def test_gumbel_numbers_are_accurate_at_both_ends(program: Path) -> None:
    words = gumbel_words()
    found = np.frombuffer(run(program, "gumbel", stdin=words.tobytes()), np.float32)
    assert np.abs(found - exact_gumbels(words)).max() < 1e-6 * 4
    assert np.abs((found - exact_gumbels(words)) / np.maximum(1, np.abs(found))).max() < 5e-7
    assert 22.8 < found.max() < 22.9
    assert -3.2 < found.min() < -3.1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_headers_compile_for_a_device(tmp_path: Path) -> None:
    (tmp_path / "device.cu").write_text(DEVICE)
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "--fmad=false", f"-I{CSRC}", "-c", str(tmp_path / "device.cu")]
    run = subprocess.run([*command, "-o", str(tmp_path / "device.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_sum_of_bits_overflows_a_signed_integer(tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", f"-I{CSRC}", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    built = tmp_path / "program"
    found = subprocess.run([COMPILER, *flags, str(tmp_path / "program.cpp"), "-o", str(built)], capture_output=True)
    if found.returncode:
        pytest.skip("the compiler cannot look for undefined behaviour")
    for words in ("exp", "merge", "widen"):
        run(built, words)
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
    run(built, "gumbel", stdin=edges.tobytes())
    run(built, "narrow", stdin=np.concatenate([edges.view(np.float32), np.float32([1e38, -1e38, 1])]).tobytes())
