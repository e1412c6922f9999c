#include "table_rows.h"

#include <algorithm>

#include "launch.h"

namespace flowmatch_kernels {

TableRows::TableRows(std::vector<std::int64_t> shape, Dtype dtype, int device, PyObject* coefficients,
                     std::int64_t slots, int rounding, int guidance, bool sum_first, PyObject* strength)
    : coefficients_(Py_NewRef(coefficients)),
      strength_tensor_(Py_NewRef(strength)),
      keys_tensor_(Py_NewRef(Py_None)),
      shape_(std::move(shape)),
      dtype_(dtype),
      device_(device),
      slots_(slots),
      rounding_(static_cast<Rounding>(rounding)),
      guidance_(static_cast<Guidance>(guidance)),
      sum_first_(sum_first) {
  const View view(coefficients);
  if (!view.seen) raise(PyExc_TypeError, "Rows: wanted coefficients that have memory");
  if (view.ndim == 3) {
    R_ = view.shape[1];
    const auto own = rows_of_sample(shape_, static_cast<std::int64_t>(shape_.size()), R_);
    if (!own || sum_first) raise(PyExc_ValueError, "Rows: wanted a row for each sample, and no sum_first");
    own_rows_ = *own;
  }
  rows_ = static_cast<char*>(view.memory);
  for (const std::int64_t size : shape_) numel_ *= size;
  if (strength != Py_None) {
    const View its(strength);
    if (!fits(its) || its.dtype != dtype_ || !its.contiguous() || lazy(strength)) {
      raise(PyExc_ValueError, "Rows: wanted a contiguous strength of the state's shape, dtype and device");
    }
    strength_ = static_cast<char*>(its.memory);
  }
  sample_ = shape_[0] ? numel_ / shape_[0] : 0;
}

std::vector<std::int64_t> TableRows::sizes(PyObject* shape) {
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) == 0) raise(PyExc_TypeError, "Rows: wanted a shape, a tuple");
  std::vector<std::int64_t> sizes;
  for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); ++d) sizes.push_back(integer(PyTuple_GET_ITEM(shape, d)));
  return sizes;
}

bool TableRows::fits(const View& view) const {
  return view.seen && view.plain && view.device == device_ && view.dtype &&
         view.ndim == static_cast<int>(shape_.size()) && std::equal(shape_.begin(), shape_.end(), view.shape);
}

void TableRows::draw(std::int64_t number, PyObject* keys) {
  const View view(keys);
  if (!view.seen || !view.int64 || view.device != device_ || view.ndim != 2 || view.shape[0] != shape_[0] ||
      view.shape[1] != 3 || !view.contiguous()) {
    raise(PyExc_ValueError, "Rows: wanted keys, int64 [B, 3], contiguous, on the states' device");
  }
  history_.at(number) = static_cast<char*>(view.memory);
  keys_tensor_ = Object(Py_NewRef(keys));
  noise_ = number;
}

bool TableRows::usable(PyObject* v, const View& view) const {
  return fits(view) && dispatch({dtype_, *view.dtype, dtype_}, rounding_, sum_first_, [](auto) {}) &&
         view.contiguous() && !lazy(v);
}

std::optional<TableRows::Row> TableRows::row(PyObject* v, PyObject* u, std::int64_t number,
                                             PyObject* evaluation) const {
  const View first(v);
  std::optional<View> second;
  if (u != Py_None) second.emplace(u);
  if (!usable(v, first) || (second && !(usable(u, *second) && second->dtype == first.dtype))) return std::nullopt;
  if (numel_ && (!first.memory || (second && !second->memory))) {
    raise(PyExc_ValueError, "a velocity has no memory (a wrapped tensor, or a storage that was resized?)");
  }
  if (!PyTuple_Check(evaluation) || PyTuple_GET_SIZE(evaluation) != 4) {
    raise(PyExc_TypeError, "Rows: wanted an Evaluation");
  }
  const bool commit = truth(PyTuple_GET_ITEM(evaluation, 1));
  PyObject *const read = PyTuple_GET_ITEM(evaluation, 2), *const write = PyTuple_GET_ITEM(evaluation, 3);
  const std::int64_t row_bytes = kColumns * size_of(arithmetic_of(dtype_));
  Operands o{.out = nullptr,
             .base = nullptr,
             .v = first.memory,
             .u = second ? second->memory : nullptr,
             .h = {},
             .row = rows_ + number * R_ * row_bytes,
             .trajectory = commit ? trajectory_ : nullptr,
             .history = write == Py_None ? nullptr : buffer(write),
             .numel = numel_,
             .sample = sample_,
             .slots = std::max<std::int64_t>(slots_, 1),
             .slot = slot_ + commit,
             .guidance = guidance_,
             .rounding = rounding_,
             .sum_first = sum_first_,
             .keyed = false,
             .rows = own_rows_,
             .strength = strength_};
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(read); ++k) {
    const std::int64_t term = integer(PyTuple_GET_ITEM(read, k));
    o.h[k] = history_.at(term);
    if (term != noise_) continue;
    if (k) raise(PyExc_ValueError, "Rows: noise is drawn as h1 alone");
    o.keyed = true;
  }
  return Row{o, {dtype_, *first.dtype, dtype_}, commit};
}

}  // namespace flowmatch_kernels
