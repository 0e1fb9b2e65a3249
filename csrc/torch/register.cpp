// Registers the operators with torch.
#include <torch/csrc/stable/library.h>

#include "torch/operators.h"
#include "torch/sample_operators.h"

// The instruction set whose loops run here, for `syncbn info`.
extern "C" __attribute__((visibility("default"))) const char* syncbn_instruction_set() {
  return syncbn::best_loopset().name;
}

// The bytes from which results ask for huge pages, or 0 where none does, for it too.
extern "C" __attribute__((visibility("default"))) int64_t syncbn_least_for_huge_pages() {
  return syncbn::asks_for_huge_pages ? syncbn::least_for_huge_pages : 0;
}

STABLE_TORCH_LIBRARY(syncbn, m) {
  m.def("measure(Tensor x) -> Tensor");
  m.def(
      "normalise(Tensor x, Tensor sets, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor y, Tensor mean, Tensor invstd, Tensor count)");
  m.def("gradient_sums(Tensor dy, Tensor x, Tensor mean, Tensor invstd) -> Tensor");
  m.def(
      "input_gradient(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
      "Tensor sums, Tensor count) -> Tensor");
  m.def(
      "measure_checked(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, Tensor? num_batches_tracked, float? momentum) -> Tensor");
  m.def(
      "gradient_sums_checked(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd) -> (Tensor sums, Tensor dweight, Tensor dbias)");
  m.def("measure_samples(Tensor x, Tensor? lengths) -> Tensor");
  m.def("merge_samples(Tensor received) -> Tensor");
  m.def(
      "gradient_sums_samples(Tensor dy, Tensor x, Tensor mean, Tensor invstd, Tensor? lengths) -> "
      "Tensor");
  m.def("total_samples(Tensor received) -> Tensor");
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor y, Tensor saved)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor saved) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(syncbn, CPU, m) {
  m.impl("measure", TORCH_BOX(&syncbn::operators::measure));
  m.impl("normalise", TORCH_BOX(&syncbn::operators::normalise));
  m.impl("gradient_sums", TORCH_BOX(&syncbn::operators::gradient_sums));
  m.impl("input_gradient", TORCH_BOX(&syncbn::operators::input_gradient));
  m.impl("measure_checked", TORCH_BOX(&syncbn::operators::measure_checked));
  m.impl("gradient_sums_checked", TORCH_BOX(&syncbn::operators::gradient_sums_checked));
  m.impl("measure_samples", TORCH_BOX(&syncbn::operators::measure_samples));
  m.impl("merge_samples", TORCH_BOX(&syncbn::operators::merge_samples));
  m.impl("gradient_sums_samples", TORCH_BOX(&syncbn::operators::gradient_sums_samples));
  m.impl("total_samples", TORCH_BOX(&syncbn::operators::total_samples));
  m.impl("batch_norm", TORCH_BOX(&syncbn::operators::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&syncbn::operators::batch_norm_backward));
}
