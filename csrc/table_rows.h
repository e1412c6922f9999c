// What the rows of a table share, wherever the states are: which velocities they can read, and a row's operands.
#pragma once

#include <optional>
#include <vector>

#include "fused_step.h"
#include "python_tensor.h"

namespace flowmatch_kernels {

class TableRows {
 public:
  std::int64_t slot() const { return slot_; }  // of base

  // From now on a row that reads history buffer `number` reads what these keys draw, int64 [B, 3].
  void draw(std::int64_t number, PyObject* keys);

 protected:
  TableRows(std::vector<std::int64_t> shape, Dtype dtype, int device, PyObject* coefficients, std::int64_t slots,
            int rounding, int guidance, bool sum_first, PyObject* strength);

  // The sizes of a state, [B, *x_dims].
  static std::vector<std::int64_t> sizes(PyObject* shape);

  // Whether a tensor is one of PyTorch's own, of the states' shape and device.
  bool fits(const View& view) const;

  // The operands of a row, with `out` and `base` left out, and its end; none, where a velocity has to be expanded or
  // copied, or is an error. `evaluation` is flowmatch_kernels.solvers.Evaluation.
  struct Row {
    Operands operands;
    Dtypes dtypes;
    bool commit;
  };
  std::optional<Row> row(PyObject* v, PyObject* u, std::int64_t number, PyObject* evaluation) const;

  void took(const Row& row) { slot_ = row.operands.slot, at_base_ = row.commit; }

  Object coefficients_, strength_tensor_, keys_tensor_;
  char *rows_, *strength_ = nullptr;  // their memory
  std::vector<std::int64_t> shape_;
  Dtype dtype_;
  int device_;
  std::int64_t numel_ = 1, sample_, slots_, R_ = 1;
  std::uint32_t own_rows_ = 0;  // of each sample; 0: one row for all, and R_ is 1
  Rounding rounding_;
  Guidance guidance_;
  bool sum_first_;
  char* trajectory_ = nullptr;  // [B, slots, *x_dims]; null: no row writes it
  std::vector<char*> history_;
  std::int64_t noise_ = -1;  // the history buffer that is drawn; none: -1
  std::int64_t slot_ = 0;
  bool at_base_ = true;  // the state is base, and not one within a step

 private:
  bool usable(PyObject* v, const View& view) const;
  char* buffer(PyObject* number) const { return history_.at(integer(number)); }
};

// draw(k, keys) of Python.
inline PyObject* drawn(TableRows& rows, PyObject* const* p) {
  rows.draw(integer(p[0]), p[1]);
  return Py_NewRef(Py_None);
}

}  // namespace flowmatch_kernels
