// Runs the kernels of every instruction set that this machine has, and compares them bit for bit with plain C++.
//
//   kernels_test      the first line names the instruction sets; then one line per case: a hash of its results and its
//                     name. The hashes are the same on every machine, but where a name says that libm has a part.
//                     Differences go to stderr, and the exit status is then 1.
//
// Everything is random and small: it also has to pass in an emulator.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "program.h"
#include "simd_generic.h"

namespace dapji {
namespace {

// The same numbers on every machine: the standard defines the engine, and no distribution is used.
class Random {
 public:
  std::uint32_t bits() { return engine_(); }
  float real() { return static_cast<float>(static_cast<std::int32_t>(bits())) * 0x1p-31f; }  // -1 .. 1
  std::vector<float> reals(std::size_t n) {
    std::vector<float> result(n);
    for (float& x : result) x = real();
    return result;
  }

 private:
  std::mt19937 engine_{20130717};
};

// What a case computes, as bits.
class Results {
 public:
  void add(const void* data, std::size_t bytes) {
    const auto* const from = static_cast<const std::uint8_t*>(data);
    bytes_.insert(bytes_.end(), from, from + bytes);
  }
  void add(const std::vector<float>& values) {
    for (float x : values) {
      if (std::isnan(x)) x = std::numeric_limits<float>::quiet_NaN();  // which NaN it is, nobody promises
      add(&x, sizeof x);
    }
  }
  std::uint64_t hash() const {  // FNV-1a
    std::uint64_t h = 0xcbf29ce484222325u;
    for (const std::uint8_t b : bytes_) h = (h ^ b) * 0x100000001b3u;
    return h;
  }
  // The first byte that differs, or the size where all are equal.
  std::size_t difference(const Results& other) const {
    std::size_t at = 0;
    while (at < bytes_.size() && at < other.bytes_.size() && bytes_[at] == other.bytes_[at]) ++at;
    return bytes_.size() == other.bytes_.size() ? at : std::min(at, bytes_.size() - 1);
  }
  std::size_t size() const { return bytes_.size(); }

 private:
  std::vector<std::uint8_t> bytes_;
};

Scratch scratch(std::size_t bytes) {
  Scratch result;
  result.reserve(bytes / sizeof(float) + 1);
  return result;
}

// ---- matrices ----

// Where a block of the file has its float16 scales; all other bytes may be anything.
std::vector<int> halves_at(Format format) {
  switch (format) {
    case Format::F32:
    case Format::F16:
    case Format::BF16:
      return {};
    case Format::Q4_1:
    case Format::Q5_1:
    case Format::Q4_K:
    case Format::Q5_K:
      return {0, 2};
    case Format::Q2_K:
      return {80, 82};
    case Format::Q3_K:
      return {108};
    case Format::Q6_K:
      return {208};
    default:
      return {0};
  }
}

std::shared_ptr<const Panels> packed(Format format, int rows, int cols, const std::function<std::uint8_t()>& byte,
                                     const std::function<float()>& real) {
  const FormatInfo& info = format_info(format);
  std::vector<std::uint8_t> data(static_cast<std::size_t>(rows) * (cols / info.block * info.block_bytes));
  const auto put_half = [&](std::size_t at) {
    const std::uint16_t half = Generic::to_f16(real());
    std::memcpy(data.data() + at, &half, 2);
  };
  const auto step = static_cast<std::size_t>(info.block_bytes);
  for (std::size_t at = 0; at < data.size(); at += step) {
    const float x = real();
    if (format == Format::F32) {
      std::memcpy(data.data() + at, &x, 4);
    } else if (format == Format::F16) {
      put_half(at);
    } else if (format == Format::BF16) {
      std::uint32_t bits;
      std::memcpy(&bits, &x, 4);
      bits >>= 16;
      data[at] = static_cast<std::uint8_t>(bits);
      data[at + 1] = static_cast<std::uint8_t>(bits >> 8);
    } else {
      for (std::size_t i = 0; i < step; ++i) data[at + i] = byte();
      for (const int half : halves_at(format)) put_half(at + static_cast<std::size_t>(half));
    }
  }
  const auto memory = allocate_zeros(panels_bytes(format, rows, cols));
  pack(format, rows, cols, data.data(), nullptr, memory.get());
  return std::make_shared<Panels>(format, rows, cols, memory);
}

std::shared_ptr<const Panels> random_panels(Format format, int rows, int cols, Random& random) {
  return packed(
      format, rows, cols, [&] { return static_cast<std::uint8_t>(random.bits()); },
      // Now and then so small that it is subnormal as a float16.
      [&] { return random.real() * (random.bits() % 8 ? 0.01f : 1e-5f); });
}

// y [tokens, rows] with three unused floats between rows, which must stay what they are.
std::vector<float> multiply(Isa isa, const Panels& panels, const float* x, std::int64_t tokens,
                            const Epilogue& epilogue = {}, std::vector<float> y = {}) {
  const MatmulKernels& kernel = kernels(isa).matmul;
  const PanelsView& w = panels.view();
  const auto cols = static_cast<std::size_t>(w.cols), ldy = static_cast<std::size_t>(w.rows) + 3;
  if (y.empty()) y.assign(static_cast<std::size_t>(tokens) * ldy, 0.5f);
  // In two calls, as two threads do it.
  const std::int64_t cut = w.n_panels / 3;
  for (const auto& [from, to] : {std::pair{std::int64_t{0}, cut}, {cut, w.n_panels}}) {
    if (is_float(w.format)) {
      kernel.linear_f(w, x, cols, tokens, from, to, y.data(), ldy, epilogue);
    } else {
      const int tile = kernel.tile(tokens);
      Scratch memory = scratch(Quantized::bytes(tokens, w.cols, tile)), space = scratch(kScratchBytes);
      const Quantized quantized = Quantized::in(memory.data(), tokens, w.cols, tile);
      kernels(Isa::generic).matmul.quantize(x, cols, 0, tokens, quantized);
      kernel.linear_q(w, quantized, tokens, from, to, y.data(), ldy, epilogue, space.data());
    }
  }
  return y;
}

// Two whole panels of 16 rows and a part; blocks of columns beyond a stretch of 16; a part of a block of float columns.
Results linear(Isa isa, Format format) {
  Random random;
  Results results;
  const int block = format_info(format).block, rows = 45, cols = block == 1 ? 100 : block == 32 ? 25 * 32 : 3 * 256;
  const auto panels = random_panels(format, rows, cols, random);
  for (const int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 31, 50}) {
    const std::vector<float> x = random.reals(static_cast<std::size_t>(tokens * cols));
    results.add(multiply(isa, *panels, x.data(), tokens));
  }
  for (const std::uint8_t code : {0x00, 0x7f, 0x80, 0xff}) {  // what overflows first
    const auto extreme = packed(format, 16, 256, [&] { return code; }, [] { return 1.0f; });
    for (const float value : {12.7f, -12.7f}) {
      const std::vector<float> x(2 * 256, value);
      results.add(multiply(isa, *extreme, x.data(), 1));
      results.add(multiply(isa, *extreme, x.data(), 2));
    }
  }
  return results;
}

Results thin(Isa isa, Format format) {
  Random random;
  Results results;
  for (const auto& [rows, cols] : {std::pair{16, 100}, {45, 3}, {7 * 16 + 5, 16}, {3, 1}}) {
    const auto panels = random_panels(format, rows, cols, random);
    for (const int tokens : {1, 2, 3, 4, 5, 9}) {
      const std::vector<float> x = random.reals(static_cast<std::size_t>(tokens * cols));
      const std::size_t ldy = static_cast<std::size_t>(rows) + 3;
      std::vector<float> y(static_cast<std::size_t>(tokens) * ldy, 0.5f);
      const std::int64_t n_panels = panels->view().n_panels, cut = n_panels / 3;
      for (const auto& [from, to] : {std::pair{std::int64_t{0}, cut}, {cut, n_panels}}) {
        kernels(isa).matmul.linear_thin(panels->view(), x.data(), static_cast<std::size_t>(cols), tokens, from, to,
                                        y.data() + 16 * from, ldy);
      }
      results.add(y);
    }
  }
  return results;
}

Results quantize(Isa isa) {
  Random random;
  Results results;
  constexpr int tokens = 3, cols = 12 * kBlock, ldx = cols + 5;
  std::vector<float> x = random.reals(tokens * ldx);
  const auto block = [&](int i) { return x.data() + ldx + i * kBlock; };  // of the second token
  const auto fill = [&](int i, float value) { std::fill_n(block(i), kBlock, value); };
  fill(0, 0.0f);
  fill(1, -0.0f);
  fill(2, 1e-40f);
  fill(3, -3e38f);
  for (int i = 0; i < kBlock; ++i) block(4)[i] = static_cast<float>(i) - 15.5f;  // ties, where the scale is 1
  block(4)[0] = 127.0f;
  block(5)[31] = std::numeric_limits<float>::infinity();
  block(6)[16] = -std::numeric_limits<float>::infinity();
  block(7)[3] = std::numeric_limits<float>::quiet_NaN();
  block(8)[7] = 1e30f;
  for (int i = 0; i < kBlock; ++i) block(9)[i] *= 1e-37f;
  constexpr int tile = 2;
  const std::size_t bytes = Quantized::bytes(tokens, cols, tile);
  Scratch memory = scratch(bytes);
  std::memset(memory.data(), 1, bytes);
  const Quantized out = Quantized::in(memory.data(), tokens, cols, tile);
  kernels(isa).matmul.quantize(x.data(), ldx, 1, tokens, out);
  const auto blocks = static_cast<std::size_t>(Quantized::blocks(tokens, cols, tile));
  results.add(out.codes, blocks * kBlock);
  results.add({out.scales, out.scales + blocks});
  results.add({out.sums, out.sums + blocks});
  results.add(out.starts, blocks * sizeof(std::int32_t));
  results.add(out.half_starts, 2 * blocks * sizeof(std::int32_t));
  results.add(out.halves, 2 * blocks * sizeof(std::int16_t));
  return results;
}

// Numbers around which the exponential function and its users change.
std::vector<float> arguments(std::size_t n, Random& random) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  std::vector<float> x = {0.0f,  -0.0f, inf,   -inf,   std::numeric_limits<float>::quiet_NaN(),
                          1e-40f, 1e-7f, -1e-7f, 17.0f, -17.0f,
                          88.7f, 88.9f, -87.3f, -87.4f, -88.8f,
                          -103.9f, -104.1f, 1e4f, -1e4f, 3e38f, -3e38f};
  while (x.size() < n) x.push_back(random.real() * (random.bits() % 2 ? 4.0f : 110.0f));
  return x;
}

Results epilogue(Isa isa, Epilogue::Kind kind, Activation activation) {
  Random random;
  Results results;
  for (const Format format : {Format::F16, Format::Q4_1}) {
    constexpr int rows = 77, cols = 64;
    const auto panels = random_panels(format, rows, cols, random);
    const std::vector<float> bias = random.reals(rows);
    for (const int tokens : {1, 5}) {
      const std::vector<float> x = random.reals(static_cast<std::size_t>(tokens * cols));
      for (const float* const with : {static_cast<const float*>(nullptr), bias.data()}) {
        const auto y = arguments(static_cast<std::size_t>(tokens * (rows + 3)), random);
        results.add(multiply(isa, *panels, x.data(), tokens, {kind, activation, with}, y));
      }
    }
  }
  return results;
}

// ---- between the matrices ----

Results norm(Isa isa) {
  Random random;
  Results results;
  for (std::size_t n = 1; n <= 160; ++n) {
    std::vector<float> x = random.reals(n), weight = random.reals(n), out(n);
    const auto size = static_cast<std::int64_t>(n);
    kernels(isa).rows.norm(x.data(), weight.data(), 1e-5f, size, out.data());
    results.add(out);
    kernels(isa).rows.norm(x.data(), weight.data(), 1e-5f, size, x.data());
    results.add(x);
  }
  return results;
}

// extras: norms of q and k, softcap, temperatures and chunks.
Results attention(Isa isa, KvFormat format, int head_dim, int rope_dim, bool extras = false) {
  Random random;
  Results results;
  constexpr int context = 330, blocks = 21, group = 3;  // two segments of positions
  const RowKernels& kernel = kernels(isa).rows;
  KvCache cache(format, {{1, head_dim, head_dim}}, blocks);
  const KvTile& tile = cache.tile(0);
  std::vector<std::int32_t> table(blocks);
  for (int i = 0; i < blocks; ++i) table[static_cast<std::size_t>(i)] = (5 * i + 3) % blocks;
  Scratch space = scratch(sizeof(float) * (attention_scratch_floats(head_dim, head_dim)));

  // Keys, rotated (and normed), and values.
  const auto angles = static_cast<std::size_t>(rope_dim / 2), dim = static_cast<std::size_t>(head_dim);
  const std::vector<float> cos = random.reals(context * angles), sin = random.reals(context * angles);
  const std::vector<float> q_norm = random.reals(extras ? dim : 0), k_norm = random.reals(extras ? dim : 0);
  const std::vector<float> temperature = random.reals(extras ? context : 0);
  const auto transform = [&](const std::vector<float>& norm) {
    return HeadTransform{extras ? norm.data() : nullptr, 1e-5f, cos.data(), sin.data(), rope_dim};
  };
  for (int position = 0; position < context; ++position) {
    const std::vector<float> k = random.reals(dim), v = random.reals(dim);
    kernel.write_kv(tile, cache.at(0, table[static_cast<std::size_t>(position / kKvBlock)], 0), position, k.data(),
                    v.data(), transform(k_norm), space.data());
  }
  results.add(cache.at(0, 0, 0), tile.bytes * blocks);

  const auto item = [&](const std::vector<float>& q, std::vector<float>& out, int position, int rows, Reach reach) {
    AttentionItem one{};
    one.kv = {&tile, cache.at(0, 0, 0), cache.block_stride(), table.data()};
    one.q = q.data();
    one.out = out.data();
    one.stride = group * dim;
    one.value_dim = head_dim;
    one.query = transform(q_norm);
    one.n_rows = rows;
    one.group = group;
    one.position = position;
    one.reach = reach;
    one.scale = 2.0f / static_cast<float>(std::sqrt(head_dim));
    one.temperature = extras ? temperature.data() : nullptr;
    one.softcap = extras ? 0.75f : 0.0f;
    one.segment = reach.first(position) / kKvSegment;
    one.end_segment = (position + rows - 1) / kKvSegment + 1;
    return one;
  };
  struct Query {
    int position, rows;
    Reach reach;
  };
  const Reach limited = extras ? Reach{100, 40} : Reach{100, 0};
  for (const Query& query : {Query{0, 3, {}}, {250, 9, limited}, {310, 5, {}}, {329, 1, {}}}) {
    const std::size_t size = static_cast<std::size_t>(query.rows) * group * dim;
    const std::vector<float> q = random.reals(size);
    std::vector<float> out(size);
    AttentionItem whole = item(q, out, query.position, query.rows, query.reach);
    kernel.attend(whole, space.data());
    results.add(out);
    if (query.rows > 1) continue;
    // The same row, its segments apart and then merged.
    const std::size_t part = attention_partial_floats(group, head_dim);
    std::vector<float> partials(2 * part), merged(size);
    for (int segment = 0; segment < 2; ++segment) {
      AttentionItem one = whole;
      one.out = nullptr;
      one.segment = segment;
      one.end_segment = segment + 1;
      one.partials = partials.data() + static_cast<std::size_t>(segment) * part;
      kernel.attend(one, space.data());
    }
    for (int row = 0; row < group; ++row) {
      kernel.combine(partials.data(), 2, group, row, head_dim, merged.data() + row * head_dim, space.data());
    }
    results.add(partials);
    if (merged != out) throw std::logic_error("a row whose segments are computed apart differs");
  }
  return results;
}

// Latent attention is attention to one kv head whose values are its keys, of which the beginning is wanted.
Results latent(Isa isa, KvFormat format, int latent_dim, int rope_dim, int heads) {
  Random random;
  Results results;
  constexpr int context = 330, blocks = 21;
  const RowKernels& kernel = kernels(isa).rows;
  const auto latents = static_cast<std::size_t>(latent_dim), angles = static_cast<std::size_t>(rope_dim / 2);
  const std::size_t dim = latents + 2 * angles;
  const int key_dim = latent_dim + rope_dim;
  KvCache shared(format, {{1, key_dim, 0}}, blocks), apart(format, {{1, key_dim, key_dim}}, blocks);
  std::vector<std::int32_t> table(blocks);
  for (int i = 0; i < blocks; ++i) table[static_cast<std::size_t>(i)] = (5 * i + 3) % blocks;
  Scratch space = scratch(sizeof(float) * attention_scratch_floats(key_dim, key_dim));

  // Angles of powers of two: so the rotation here is exact but for one rounding, whatever a compiler contracts.
  std::vector<float> cos(context * angles), sin(context * angles);
  for (float& x : cos) x = std::ldexp(1.0f, -static_cast<int>(random.bits() % 4));
  for (float& x : sin) x = std::ldexp(-1.0f, -static_cast<int>(random.bits() % 4));
  const std::vector<float> norm = random.reals(latents);
  const auto rotated = [&](const float* x, int position, float* out) {
    for (std::size_t i = 0; i < angles; ++i) {
      const float c = cos[static_cast<std::size_t>(position) * angles + i];
      const float s = sin[static_cast<std::size_t>(position) * angles + i];
      out[i] = x[i] * c - x[angles + i] * s;
      out[angles + i] = x[angles + i] * c + x[i] * s;
    }
  };
  for (int position = 0; position < context; ++position) {
    const std::vector<float> latent = random.reals(latents), k_rope = random.reals(2 * angles);
    const int block = table[static_cast<std::size_t>(position / kKvBlock)];
    kernel.write_latent(shared.tile(0), shared.at(0, block, 0), position, latent.data(), k_rope.data(),
                        {norm.data(), 1e-5f, cos.data(), sin.data(), rope_dim}, space.data());
    std::vector<float> key(dim);
    kernel.norm(latent.data(), norm.data(), 1e-5f, latent_dim, key.data());
    rotated(k_rope.data(), position, key.data() + latents);
    kernel.write_kv(apart.tile(0), apart.at(0, block, 0), position, key.data(), key.data(), {}, space.data());
  }
  results.add(shared.at(0, 0, 0), shared.bytes());

  for (const auto& [position, rows] : {std::pair{0, 3}, {250, 9}, {329, 1}}) {
    const auto n = static_cast<std::size_t>(rows * heads);
    std::vector<float> q = random.reals(n * latents), q_rope = random.reals(n * 2 * angles);
    std::vector<float> queries(n * dim), wanted(n * dim);
    for (std::size_t i = 0; i < n; ++i) {
      std::copy_n(q.data() + i * latents, latents, queries.data() + i * dim);
      rotated(q_rope.data() + i * 2 * angles, position + static_cast<int>(i) / heads, queries.data() + i * dim + latents);
    }
    AttentionItem one{};
    one.n_rows = rows;
    one.group = heads;
    one.position = position;
    one.scale = 0.5f;
    one.end_segment = (position + rows - 1) / kKvSegment + 1;
    AttentionItem other = one;
    other.kv = {&apart.tile(0), apart.at(0, 0, 0), apart.block_stride(), table.data()};
    other.q = queries.data();
    other.out = wanted.data();
    other.stride = static_cast<std::size_t>(heads) * dim;
    other.value_dim = key_dim;
    kernel.attend(other, space.data());

    one.kv = {&shared.tile(0), shared.at(0, 0, 0), shared.block_stride(), table.data()};
    one.q = one.out = q.data();
    one.stride = static_cast<std::size_t>(heads) * latents;
    one.value_dim = latent_dim;
    one.q_rope = q_rope.data();
    one.rope_stride = static_cast<std::size_t>(heads) * 2 * angles;
    one.query = {nullptr, 0, cos.data(), sin.data(), rope_dim};
    kernel.attend(one, space.data());
    results.add(q);
    for (std::size_t i = 0; i < n; ++i) {
      if (!std::equal(q.data() + i * latents, q.data() + (i + 1) * latents, wanted.data() + i * dim)) {
        throw std::logic_error("latent attention differs from attention to the same keys");
      }
    }
  }
  return results;
}

Results read(Isa isa) {
  Random random;
  std::vector<std::uint32_t> data(3 * 512 / 4);
  for (std::uint32_t& x : data) x = random.bits();
  const std::int32_t largest =
      kernels(isa).machine.read(reinterpret_cast<const std::uint8_t*>(data.data()), data.size() * 4);
  Results results;
  results.add(&largest, 4);
  return results;
}

// ---- a small model: one layer and experts, a weight of every other kind ----

Results program(Isa isa, int threads) {
  Random random;
  constexpr int vocab = 50, context = 320, heads = 4, kv_heads = 2, head_dim = 16, hidden = 256, blocks = 24;
  constexpr int n_experts = 6;
  constexpr int dim = heads * head_dim, kv_dim = kv_heads * head_dim;
  Program program(isa, threads, context, vocab, KvFormat::q8, {{kv_heads, head_dim, head_dim}}, blocks,
                  {dim, dim, kv_dim, kv_dim, dim, hidden, dim, n_experts});
  enum Buffer { x, q, k, v, mixed, gated, taken, router };
  using Kind = Epilogue::Kind;
  const auto product = [&](Format format, int rows, int cols, int output, Kind kind = Kind::store, bool biased = false) {
    return Product{random_panels(format, rows, cols, random),
                   biased ? random.reals(static_cast<std::size_t>(rows)) : std::vector<float>{}, output, kind,
                   Activation::silu};
  };
  const Norm norm{random.reals(dim), 1e-5f};
  program.add_embed(random_panels(Format::Q8_0, vocab, dim, random), 1.0f, x);
  program.add_linear(x, norm,
                     {product(Format::Q4_0, dim, dim, q, Kind::store, true), product(Format::Q5_1, kv_dim, dim, k),
                      product(Format::IQ4_NL, kv_dim, dim, v)});
  const std::vector<float> cos = random.reals(context * head_dim / 2), sin = random.reals(context * head_dim / 2);
  const int rope = program.add_rope(cos.data(), sin.data(), head_dim);
  program.add_attention(q, k, v, mixed, {0, heads, rope, 0.25f, {}, 0, {}, std::nullopt, std::nullopt});
  program.add_linear(mixed, std::nullopt, {product(Format::F16, dim, dim, x, Kind::add)});
  program.add_linear(x, norm,
                     {product(Format::Q4_1, hidden, dim, gated),
                      product(Format::Q8_0, hidden, dim, gated, Kind::gate)});
  program.add_linear(gated, std::nullopt, {product(Format::Q6_K, dim, hidden, x, Kind::add)});
  program.add_norm(x, norm, taken, false);
  program.add_linear(taken, std::nullopt, {product(Format::F32, n_experts, dim, router)});
  const auto experts = [&](Format format, int rows, int cols) {
    std::vector<std::shared_ptr<const Panels>> all;
    for (int i = 0; i < n_experts; ++i) all.push_back(random_panels(format, rows, cols, random));
    return all;
  };
  ExpertMatrices matrices{experts(Format::Q4_0, hidden, dim), experts(Format::BF16, hidden, dim),
                          experts(Format::Q4_K, dim, hidden)};
  program.add_experts(taken, router, x, matrices, Activation::silu,
                      {n_experts, 2, /*sigmoid*/ true, 3, 2, /*top2*/ true, /*normalized*/ true, 2.5f, false},
                      random.reals(n_experts));
  program.add_experts(taken, router, x, std::move(matrices), Activation::gelu_tanh,
                      {n_experts, 3, /*sigmoid*/ false, 1, 1, false, false, 1.0f, /*weighs_input*/ true}, {});
  program.add_norm(taken, norm, x, true);
  program.add_select({x});
  program.add_linear(x, norm, {product(Format::Q8_0, vocab, dim, Program::kLogits)});
  program.add_softcap(3.0f);
  const auto low_rank = [&](int operation, int cols, std::vector<std::pair<int, int>> parts) {  // (product, rows)
    constexpr int rank = 11;
    LowRank change{operation, random_panels(Format::F32, rank, cols, random), random.reals(rank), {}};
    for (const auto& [index, rows] : parts) {
      const int from = index == 0 ? 0 : 4;
      change.parts.push_back({index, random_panels(index == 0 ? Format::F32 : Format::BF16, rows, 7, random), from});
    }
    return change;
  };
  enum Operation { qkv = 1, gate_up = 4, down = 5, head = 12 };
  program.add_adapter(1, {low_rank(qkv, dim, {{0, dim}, {2, kv_dim}}), low_rank(gate_up, dim, {{0, hidden}, {1, hidden}}),
                          low_rank(head, dim, {{0, vocab}})});
  program.add_adapter(7, {low_rank(down, hidden, {{0, dim}})});
  program.set_magnitude(1, qkv, 2, random.reals(kv_dim));
  program.set_magnitude(1, gate_up, 0, random.reals(hidden));
  program.set_magnitude(1, head, 0, random.reals(vocab));

  // Two sequences: a prompt of each, then a token of each, then a few of the first.
  Results results;
  std::vector<std::int32_t> table(2 * context / kKvBlock);
  std::iota(table.begin(), table.begin() + 20, 0);
  std::iota(table.begin() + 20, table.begin() + 24, 20);
  struct Step {
    std::vector<std::int32_t> lengths, firsts, rows, adapters;
  };
  for (const Step& step : {Step{{265, 6}, {0, 0}, {100, 264, 270}, {0, 0}}, Step{{1, 1}, {265, 6}, {0, 1}, {0, 0}},
                           Step{{11, 1}, {266, 7}, {0, 3, 4, 5, 6, 7, 8, 9, 10, 11}, {0, 0}},
                           Step{{1, 1}, {277, 8}, {0, 1}, {7, 1}}, Step{{30, 4}, {278, 9}, {3, 29, 30, 33}, {1, 0}}}) {
    std::vector<std::int32_t> tokens, positions, starts = {0};
    for (std::size_t s = 0; s < 2; ++s) {
      for (std::int32_t i = 0; i < step.lengths[s]; ++i) {
        tokens.push_back(static_cast<std::int32_t>(random.bits() % vocab));
        positions.push_back(step.firsts[s] + i);
      }
      starts.push_back(static_cast<std::int32_t>(tokens.size()));
    }
    BatchView batch{};
    batch.tokens = tokens.data();
    batch.positions = positions.data();
    batch.starts = starts.data();
    batch.blocks = table.data();
    batch.rows = step.rows.data();
    batch.adapters = step.adapters.data();
    batch.n_tokens = static_cast<int>(tokens.size());
    batch.n_sequences = 2;
    batch.n_columns = context / kKvBlock;
    batch.n_rows = static_cast<int>(step.rows.size());
    std::vector<float> logits(step.rows.size() * vocab);
    program.step(batch, logits.data(), nullptr);
    results.add(logits);
  }
  return results;
}

struct Case {
  std::string name;
  std::function<Results(Isa)> run;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int i = 0; i < kFormats; ++i) {
    const Format format = static_cast<Format>(i);
    all.push_back({std::string("linear ") + format_info(format).name, [=](Isa isa) { return linear(isa, format); }});
  }
  for (const Format format : {Format::F32, Format::F16, Format::BF16}) {
    all.push_back({std::string("thin ") + format_info(format).name, [=](Isa isa) { return thin(isa, format); }});
  }
  all.push_back({"quantize", quantize});
  using Kind = Epilogue::Kind;
  all.push_back({"store", [](Isa isa) { return epilogue(isa, Kind::store, Activation::silu); }});
  all.push_back({"add", [](Isa isa) { return epilogue(isa, Kind::add, Activation::silu); }});
  all.push_back({"silu", [](Isa isa) { return epilogue(isa, Kind::gate, Activation::silu); }});
  all.push_back({"gelu_tanh", [](Isa isa) { return epilogue(isa, Kind::gate, Activation::gelu_tanh); }});
  all.push_back({"gelu, by libm", [](Isa isa) { return epilogue(isa, Kind::gate, Activation::gelu); }});
  all.push_back({"norm", norm});
  for (const auto& [name, format] : {std::pair{"f32", KvFormat::f32}, {"f16", KvFormat::f16}, {"q8", KvFormat::q8}}) {
    const KvFormat kv = format;
    const std::string what = std::string("attention ") + name;
    all.push_back({what + ", heads of 72", [=](Isa isa) { return attention(isa, kv, 72, 40); }});
    all.push_back({what + ", heads of 32, unrotated", [=](Isa isa) { return attention(isa, kv, 32, 0); }});
    all.push_back({what + ", extras", [=](Isa isa) { return attention(isa, kv, 72, 40, true); }});
    all.push_back({what + ", latents of 64", [=](Isa isa) { return latent(isa, kv, 64, 16, 9); }});
    all.push_back({what + ", latents of 43", [=](Isa isa) { return latent(isa, kv, 43, 6, 5); }});
  }
  all.push_back({"read", read});
  all.push_back({"program", [](Isa isa) {
                   const Results one = program(isa, 1);
                   for (const int threads : {2, 3}) {
                     if (program(isa, threads).difference(one) != one.size()) {
                       throw std::logic_error(std::to_string(threads) + " threads differ from one");
                     }
                   }
                   return one;
                 }});
  return all;
}

int run() {
  std::vector<Isa> isas;
  for (int i = 0; i < kIsas; ++i) {
    if (!isa_available(static_cast<Isa>(i))) continue;
    isas.push_back(static_cast<Isa>(i));
    std::printf("%s%s", i ? " " : "", isa_name(isas.back()));
  }
  std::printf("\n");
  int failures = 0;
  for (const Case& one : cases()) {
    Results want;
    for (const Isa isa : isas) {
      std::string wrong;
      try {
        const Results results = one.run(isa);
        if (isa == Isa::generic) {
          want = results;
          std::printf("%016llx %s\n", static_cast<unsigned long long>(want.hash()), one.name.c_str());
        }
        const std::size_t at = results.difference(want);
        if (at != want.size()) wrong = "byte " + std::to_string(at) + " of " + std::to_string(want.size()) + " differs";
      } catch (const std::logic_error& error) {
        wrong = error.what();
      }
      if (wrong.empty()) continue;
      std::fprintf(stderr, "%s on %s: %s\n", one.name.c_str(), isa_name(isa), wrong.c_str());
      ++failures;
    }
  }
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace dapji

int main() { return dapji::run(); }
