// The options of a row: those of its call, as the call's adjustments change them.
#pragma once

#include "adjust.h"

namespace tgt {
inline namespace TGT_ISA {

// Mean and standard deviation of the classes of a side that are there.
struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the differences from the mean

  TGT_HD void add(double other_count, double other_mean, double other_squares) {
    if (other_count == 0) return;
    const double all = count + other_count, apart = other_mean - mean;
    squares += other_squares + apart * apart * (count * other_count / all);
    mean += apart * (other_count / all);
    count = all;
  }
  TGT_HD double spread() const { return sqrt(squares / (count > 2 ? count - 1 : 1)); }
};

// Of a side whose logits are standardised: z = (x - mean) / (1e-7 + spread) is a temperature for the kernel, and a mean
// that no probability sees.
struct Standard {
  double mean = 0;  // of the logits as the row's blocks give them
  double bend = 0;  // by how much of its part along x - mean a gradient is less
};

// 1e-7 + spread, which is as a temperature to the kernel.
TGT_HD double standardise(const Moments& moments, Standard& side) {
  const double spread = moments.spread(), scale = 1e-7 + spread;
  side.mean = moments.mean;
  side.bend = spread > 0 ? 1 / ((moments.count > 2 ? moments.count - 1 : 1) * spread * scale) : 0;
  return scale;
}

// The options, with what each row would divide by again.
struct RowOptions : DistillOptions {
  double inverse_ts = 1, inverse_tt = 1;
  double squared = 1;  // the soft term's factor, where it goes by probabilities
  // Of a row with adjustments:
  double of_label = 0, of_others = 0;  // of the parts of a decoupled divergence
  double margin = 0;                   // what the label's logit is lowered by in the hard term
  double skew = 0;
  double lead = 0;  // of the label in a corrected teacher
  bool standardized = false;
  Standard student, teacher;

  TGT_HD explicit RowOptions(const DistillOptions& options) : DistillOptions(options) {
    set_temperatures(options.temperature, options.teacher_temperature);
    squared = options.temperature * options.temperature;
  }

  TGT_HD void set_temperatures(double of_student, double of_teacher) {
    temperature = of_student;
    teacher_temperature = of_teacher;
    inverse_ts = 1 / of_student;
    inverse_tt = 1 / of_teacher;
  }

  // Of one side beside itself.
  TGT_HD RowOptions alone(bool of_teacher) const {
    RowOptions side = *this;
    const double own = of_teacher ? teacher_temperature : temperature;
    side.set_temperatures(own, own);
    side.student = side.teacher = of_teacher ? teacher : student;
    return side;
  }

  // What row i has of its own.
  TGT_HD void adjust_row(const Adjustments& adjust, int64_t i) {
    skew = adjust.skew;
    if (!adjust.student_temperature) return;
    const double own = adjust.student_temperature[i];
    set_temperatures(own, adjust.teacher_temperature[i]);
    squared = own * own;
  }
  TGT_HD void standardise_row(const Moments& of_student, const Moments& of_teacher) {
    standardized = true;
    const double ts = temperature * standardise(of_student, student);
    set_temperatures(ts, teacher_temperature * standardise(of_teacher, teacher));
  }
  // What goes by its label. `soft`: the soft term is asked for. True where it is taken among the other classes.
  TGT_HD bool adjust_label(const Adjustments& adjust, int64_t label, bool soft) {
    if (adjust.label_margin && hard_weight != 0) margin = adjust.label_margin[label];
    if (!soft) return false;
    lead = adjust.lead;
    if (!adjust.decoupled()) return false;
    of_label = adjust.of_label;
    of_others = adjust.of_others;
    return true;
  }
};

}  // namespace TGT_ISA
}  // namespace tgt
