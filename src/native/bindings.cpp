// The extension module dapji.ops._native: thin, one function per method; dapji.ops.native is what Python code uses.
// std::invalid_argument becomes ValueError, std::bad_alloc MemoryError. The GIL is released wherever work is done.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "isa.h"
#include "machine.h"
#include "memory.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dapji {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstPackedBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Order = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntMatrix = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<float> copied(const Floats& values) { return {values.data(), values.data() + values.size()}; }

using NormTuple = std::pair<Floats, float>;  // (weight, eps)

std::optional<Norm> converted(const std::optional<NormTuple>& norm) {
  if (!norm) return std::nullopt;
  return Norm{copied(norm->first), norm->second};
}

KvFormat parse_kv(const std::string& name) {
  if (name == "f32") return KvFormat::f32;
  if (name == "f16") return KvFormat::f16;
  if (name == "q8") return KvFormat::q8;
  throw std::invalid_argument("unknown KV cache format " + name);
}

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw std::invalid_argument("unknown activation " + name);
}

Epilogue::Kind parse_kind(const std::string& name) {
  if (name == "store") return Epilogue::Kind::store;
  if (name == "add") return Epilogue::Kind::add;
  if (name == "gate") return Epilogue::Kind::gate;
  throw std::invalid_argument("unknown kind of product " + name);
}

void check_packed(std::size_t size, const std::uint8_t* data, std::size_t wanted) {
  if (size != wanted || reinterpret_cast<std::uintptr_t>(data) % 64) {
    throw std::invalid_argument("the memory of the panels must be " + std::to_string(wanted) + " bytes, aligned to 64");
  }
}

void pack_into(const std::string& format, std::int64_t rows, std::int64_t cols, const Bytes& data,
               const std::optional<Order>& order, const PackedBytes& out) {
  const Format parsed = parse_format(format.c_str());
  const FormatInfo& info = format_info(parsed);
  check_packed(out.size(), out.data(), panels_bytes(parsed, rows, cols));
  if (static_cast<std::int64_t>(data.shape(0)) != rows ||
      static_cast<std::int64_t>(data.shape(1)) != cols / info.block * info.block_bytes) {
    throw std::invalid_argument("the data is not " + std::to_string(rows) + " x " + std::to_string(cols) + " of " +
                                info.name);
  }
  if (order && static_cast<std::int64_t>(order->size()) != rows) throw std::invalid_argument("the order does not fit");
  for (std::size_t i = 0; order && i < order->size(); ++i) {
    if (order->data()[i] < 0 || order->data()[i] >= rows) throw std::invalid_argument("the order names no row");
  }
  const std::uint8_t* const from = data.data();
  const std::int64_t* const rows_of = order ? order->data() : nullptr;
  std::uint8_t* const to = out.data();
  const nb::gil_scoped_release release;
  pack(parsed, rows, cols, from, rows_of, to);
}

// Where the next of `count` strings of a GGUF file ends: 8 bytes of length, then as many of text. Throws
// std::invalid_argument where the data ends before.
std::size_t string_end(const ConstPackedBytes& data, std::size_t at) {
  std::uint64_t size = 0;
  if (data.size() - at < 8) throw std::invalid_argument("the data ends in a string's length");
  for (int i = 0; i < 8; ++i) size |= std::uint64_t{data.data()[at + i]} << 8 * i;
  if (data.size() - at - 8 < size) throw std::invalid_argument("the data ends in a string");
  return at + 8 + size;
}

// (panels, bias, output, kind, activation)
using ProductTuple =
    std::tuple<std::shared_ptr<Panels>, std::optional<Floats>, int, std::string, std::string>;

void add_linear(Program& program, int input, const std::optional<Floats>& norm, float eps,
                const std::vector<ProductTuple>& products) {
  std::vector<Product> converted;
  for (const auto& [panels, bias, output, kind, activation] : products) {
    converted.push_back({panels, bias ? copied(*bias) : std::vector<float>{}, output, parse_kind(kind),
                         parse_activation(activation)});
  }
  std::optional<Norm> normed;
  if (norm) normed = Norm{copied(*norm), eps};
  program.add_linear(input, std::move(normed), std::move(converted));
}

using ManyPanels = std::vector<std::shared_ptr<Panels>>;

void add_experts(Program& program, int input, int logits, int output, const ManyPanels& gate, const ManyPanels& up,
                 const ManyPanels& down, const std::string& activation, int n_per_token, bool sigmoid, int n_groups,
                 int n_groups_per_token, bool top2, bool normalized, float scale, bool weighs_input,
                 const std::optional<Floats>& selection_bias) {
  const Routing routing{static_cast<int>(gate.size()), n_per_token, sigmoid, n_groups, n_groups_per_token, top2,
                        normalized, scale, weighs_input};
  program.add_experts(input, logits, output,
                      {{gate.begin(), gate.end()}, {up.begin(), up.end()}, {down.begin(), down.end()}},
                      parse_activation(activation), routing,
                      selection_bias ? copied(*selection_bias) : std::vector<float>{});
}

// (operation, a, scales, [(product, b, from)])
using LowRankTuple = std::tuple<int, std::shared_ptr<Panels>, Floats,
                                std::vector<std::tuple<int, std::shared_ptr<Panels>, int>>>;

void add_adapter(Program& program, int number, const std::vector<LowRankTuple>& changes) {
  std::vector<LowRank> converted;
  for (const auto& [operation, a, scales, parts] : changes) {
    LowRank change{operation, a, copied(scales), {}};
    for (const auto& [product, b, from] : parts) change.parts.push_back({product, b, from});
    converted.push_back(std::move(change));
  }
  const nb::gil_scoped_release release;
  program.add_adapter(number, std::move(converted));
}

void step(Program& program, const Ints& tokens, const Ints& positions, const Ints& starts, const IntMatrix& blocks,
          const Ints& rows, const Result& logits, const std::optional<Ints>& hidden_rows,
          const std::optional<Result>& hidden, const std::optional<Ints>& adapters) {
  BatchView batch{};
  batch.tokens = tokens.data();
  batch.positions = positions.data();
  batch.starts = starts.data();
  batch.blocks = blocks.data();
  batch.rows = rows.data();
  batch.hidden_rows = hidden_rows ? hidden_rows->data() : nullptr;
  batch.adapters = adapters ? adapters->data() : nullptr;
  batch.n_tokens = static_cast<int>(tokens.size());
  batch.n_sequences = static_cast<int>(starts.size()) - 1;
  batch.n_columns = static_cast<int>(blocks.shape(1));
  batch.n_rows = static_cast<int>(rows.size());
  batch.n_hidden = hidden_rows ? static_cast<int>(hidden_rows->size()) : 0;
  const bool hidden_fits = hidden ? static_cast<int>(hidden->shape(0)) == batch.n_hidden &&
                                        static_cast<int>(hidden->shape(1)) == program.hidden_width()
                                  : batch.n_hidden == 0;
  if (positions.size() != tokens.size() || static_cast<std::int64_t>(blocks.shape(0)) != batch.n_sequences ||
      (adapters && static_cast<int>(adapters->size()) != batch.n_sequences) || logits.shape(0) != rows.size() ||
      static_cast<int>(logits.shape(1)) != program.vocab() || !hidden_fits) {
    throw std::invalid_argument("the arrays of the batch do not fit each other");
  }
  float *const out = logits.data(), *const hidden_out = hidden ? hidden->data() : nullptr;
  const nb::gil_scoped_release release;
  program.step(batch, out, hidden_out);
}

// y = x W^T by the kernels of one instruction set, on the calling thread, for tests of the kernels alone.
void linear(const std::string& isa, const Panels& panels, const FloatMatrix& x, const Result& y) {
  const PanelsView& w = panels.view();
  const auto tokens = static_cast<std::int64_t>(x.shape(0));
  if (static_cast<std::int64_t>(x.shape(1)) != w.cols || static_cast<std::int64_t>(y.shape(0)) != tokens ||
      static_cast<std::int64_t>(y.shape(1)) != w.rows) {
    throw std::invalid_argument("shapes do not fit");
  }
  const MatmulKernels& kernel = kernels(parse_isa(isa.c_str())).matmul;
  const auto ldx = static_cast<std::size_t>(w.cols), ldy = static_cast<std::size_t>(w.rows);
  const float* const from = x.data();
  float* const to = y.data();
  const nb::gil_scoped_release release;
  if (is_float(w.format)) {
    kernel.linear_f(w, from, ldx, tokens, 0, w.n_panels, to, ldy, {});
    return;
  }
  Scratch memory, scratch;
  const int tile = kernel.tile(tokens);
  memory.reserve(Quantized::bytes(tokens, w.cols, tile) / sizeof(float));
  scratch.reserve(kScratchBytes / sizeof(float));
  const Quantized quantized = Quantized::in(memory.data(), tokens, w.cols, tile);
  kernel.quantize(from, ldx, 0, tokens, quantized);
  kernel.linear_q(w, quantized, tokens, 0, w.n_panels, to, ldy, {}, scratch.data());
}

}  // namespace
}  // namespace dapji

NB_MODULE(_native, m) {
  using namespace dapji;
  m.doc() = "The native core; see dapji.ops.native.";

  m.def("choose_isa", [] { return std::string(isa_name(choose_isa())); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kIsas; ++i) {
      if (isa_available(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    }
    return names;
  });
  m.def(
      "read_bandwidth", [](unsigned threads) { return read_bandwidth(choose_isa(), threads); }, "threads"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "int8_peak", [](unsigned threads) { return int8_peak(choose_isa(), threads); }, "threads"_a,
      nb::call_guard<nb::gil_scoped_release>());

  m.attr("PANELS_VERSION") = kPanelsVersion;
  nb::class_<Panels>(m, "Panels")
      .def(
          "__init__",
          [](Panels* self, const std::string& format, std::int64_t rows, std::int64_t cols,
             const ConstPackedBytes& data) {
            const Format parsed = parse_format(format.c_str());
            check_packed(data.size(), data.data(), panels_bytes(parsed, rows, cols));
            const auto owner = std::make_shared<ConstPackedBytes>(data);
            new (self) Panels(parsed, rows, cols, {owner, owner->data()});
          },
          "format"_a, "rows"_a, "cols"_a, "data"_a)
      .def(
          "dequantize_row",
          [](const Panels& panels, std::int64_t row, nb::ndarray<float, nb::ndim<1>, nb::c_contig> out) {
            if (row < 0 || row >= panels.view().rows || static_cast<std::int64_t>(out.size()) != panels.view().cols) {
              throw std::invalid_argument("no such row, or no room for it");
            }
            dequantize_row(panels.view(), row, out.data());
          },
          "row"_a, "out"_a.noconvert());
  m.def(
      "panels_bytes",
      [](const std::string& format, std::int64_t rows, std::int64_t cols) {
        return panels_bytes(parse_format(format.c_str()), rows, cols);
      },
      "format"_a, "rows"_a, "cols"_a);
  m.def(
      "allocate_panels",
      [](std::size_t n_bytes) {
        auto* const memory = new std::shared_ptr<std::uint8_t>(allocate_zeros(n_bytes));
        const nb::capsule owner(memory, [](void* p) noexcept { delete static_cast<std::shared_ptr<std::uint8_t>*>(p); });
        return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(memory->get(), {n_bytes}, owner);
      },
      "n_bytes"_a);
  m.def("pack", &pack_into, "format"_a, "rows"_a, "cols"_a, "data"_a, "order"_a.none(), "out"_a.noconvert());
  m.def(
      "skip_strings",
      [](const ConstPackedBytes& data, std::size_t count) {
        std::size_t at = 0;
        for (std::size_t i = 0; i < count; ++i) at = string_end(data, at);
        return at;
      },
      "data"_a, "count"_a);
  m.def(
      "read_strings",
      [](const ConstPackedBytes& data, std::size_t count) {
        nb::list strings;
        std::size_t at = 0;
        for (std::size_t i = 0; i < count; ++i) {
          const std::size_t end = string_end(data, at);
          const char* const text = reinterpret_cast<const char*>(data.data()) + at + 8;
          PyObject* const string = PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(end - at - 8), nullptr);
          if (string == nullptr) throw nb::python_error();
          strings.append(nb::steal(string));
          at = end;
        }
        return std::make_pair(strings, at);
      },
      "data"_a, "count"_a);
  m.def("linear", &linear, "isa"_a, "panels"_a, "x"_a, "y"_a.noconvert());

  nb::class_<Program>(m, "Program")
      .def(
          "__init__",
          [](Program* self, const std::string& isa, int threads, int context, int vocab, const std::string& kv,
             const std::vector<std::tuple<int, int, int>>& layers, int n_blocks, const std::vector<int>& widths) {
            std::vector<KvShape> shapes;
            for (const auto& [n_kv_heads, key_dim, value_dim] : layers) {
              shapes.push_back({n_kv_heads, key_dim, value_dim});
            }
            new (self)
                Program(parse_isa(isa.c_str()), threads, context, vocab, parse_kv(kv), shapes, n_blocks, widths);
          },
          "isa"_a, "threads"_a, "context"_a, "vocab"_a, "kv"_a, "layers"_a, "n_blocks"_a, "widths"_a)
      .def_ro_static("LOGITS", &Program::kLogits)
      .def(
          "add_embed",
          [](Program& program, std::shared_ptr<Panels> table, float scale, int output) {
            program.add_embed(std::move(table), scale, output);
          },
          "table"_a, "scale"_a, "output"_a)
      .def(
          "add_norm",
          [](Program& program, int input, const Floats& weight, float eps, int output, bool added) {
            program.add_norm(input, Norm{copied(weight), eps}, output, added);
          },
          "input"_a, "weight"_a, "eps"_a, "output"_a, "added"_a)
      .def("add_linear", &add_linear, "input"_a, "norm"_a.none(), "eps"_a, "products"_a)
      .def(
          "add_rope",
          [](Program& program, const FloatMatrix& cos, const FloatMatrix& sin) {
            if (cos.shape(0) != sin.shape(0) || cos.shape(1) != sin.shape(1) ||
                static_cast<int>(cos.shape(0)) < program.context()) {
              throw std::invalid_argument("the rope table does not fit");
            }
            return program.add_rope(cos.data(), sin.data(), static_cast<int>(cos.shape(1)) * 2);
          },
          "cos"_a, "sin"_a)
      .def(
          "add_attention",
          [](Program& program, int q, int k, int v, int output, int layer, int n_heads, int rope, float scale,
             int window, int chunk, float softcap, const std::optional<Floats>& temperature,
             const std::optional<NormTuple>& q_norm, const std::optional<NormTuple>& k_norm) {
            program.add_attention(q, k, v, output,
                                  {layer, n_heads, rope, scale, {window, chunk}, softcap,
                                   temperature ? copied(*temperature) : std::vector<float>{}, converted(q_norm),
                                   converted(k_norm)});
          },
          "q"_a, "k"_a, "v"_a, "output"_a, "layer"_a, "n_heads"_a, "rope"_a, "scale"_a, "window"_a, "chunk"_a,
          "softcap"_a, "temperature"_a.none(), "q_norm"_a.none(), "k_norm"_a.none())
      .def("add_experts", &add_experts, "input"_a, "logits"_a, "output"_a, "gate"_a, "up"_a, "down"_a, "activation"_a,
           "n_per_token"_a, "sigmoid"_a, "n_groups"_a, "n_groups_per_token"_a, "top2"_a, "normalized"_a, "scale"_a,
           "weighs_input"_a, "selection_bias"_a.none())
      .def(
          "add_head_linear",
          [](Program& program, int input, const std::vector<std::shared_ptr<Panels>>& matrices, int output) {
            program.add_head_linear(input, {matrices.begin(), matrices.end()}, output);
          },
          "input"_a, "matrices"_a, "output"_a)
      .def(
          "add_latent_attention",
          [](Program& program, int q, int q_rope, int latent, int k_rope, int layer, int n_heads, int rope,
             float scale, const NormTuple& norm) {
            program.add_latent_attention(q, q_rope, latent, k_rope, layer, n_heads, rope, scale,
                                         {copied(norm.first), norm.second});
          },
          "q"_a, "q_rope"_a, "latent"_a, "k_rope"_a, "layer"_a, "n_heads"_a, "rope"_a, "scale"_a, "norm"_a)
      .def(
          "add_hidden",
          [](Program& program, int input, const Floats& weight, float eps) {
            program.add_hidden(input, Norm{copied(weight), eps});
          },
          "input"_a, "weight"_a, "eps"_a)
      .def("add_select", &Program::add_select, "buffers"_a)
      .def("add_softcap", &Program::add_softcap, "cap"_a)
      .def("add_adapter", &add_adapter, "number"_a, "changes"_a)
      .def(
          "set_magnitude",
          [](Program& program, int number, int operation, int product, const Floats& magnitude) {
            const std::vector<float> values = copied(magnitude);
            const nb::gil_scoped_release release;
            program.set_magnitude(number, operation, product, values);
          },
          "number"_a, "operation"_a, "product"_a, "magnitude"_a)
      .def("remove_adapter", &Program::remove_adapter, "number"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("step", &step, "tokens"_a, "positions"_a, "starts"_a, "blocks"_a, "rows"_a,
           "logits"_a.noconvert(), "hidden_rows"_a = nb::none(), "hidden"_a.noconvert() = nb::none(),
           "adapters"_a = nb::none())
      .def("copy_block", &Program::copy_block, "source"_a, "target"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("describe", &Program::describe)
      .def("profile", &Program::profile, "on"_a)
      .def("times", &Program::times)
      .def_prop_ro("cache_bytes", &Program::cache_bytes);
}
