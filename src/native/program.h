// Program: a model's computation as a flat list of fused operations over buffers, replayed once per step.
//
// Built once at load by dapji.ops.native, which records the decoder. A step runs on all threads of a pool from the
// first operation to the last; in it nothing is allocated and nothing throws.
//
// Shapes: T new tokens, R rows whose logits are wanted, N rows whose hidden states are, B sequences, V vocabulary, D
// dim; buffers are [T, width] float32, rows contiguous. From the `select` operation on, they have R rows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "kernels.h"
#include "kvcache.h"
#include "panels.h"
#include "pool.h"
#include "routing.h"

namespace dapji {

// Throws std::invalid_argument.
[[noreturn]] void refuse(const std::string& what);

// The arrays of dapji.ops.batch.Batch; owned by the caller of step().
struct BatchView {
  const std::int32_t* tokens;     // [T]
  const std::int32_t* positions;  // [T]
  const std::int32_t* starts;     // [B + 1]
  const std::int32_t* blocks;     // [B, n_columns]
  const std::int32_t* rows;       // [R]
  const std::int32_t* hidden_rows;  // [N]
  const std::int32_t* adapters;     // [B] or none
  int n_tokens, n_sequences, n_columns, n_rows, n_hidden;
};

// Floats, 64-byte aligned, that grow without keeping their contents.
class Scratch {
 public:
  void reserve(std::size_t n_floats);  // throws std::bad_alloc
  float* data() { return data_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* data_ = nullptr;
  std::size_t size_ = 0;
};

// One matrix of a linear operation and what happens to its product.
struct Product {
  std::shared_ptr<const Panels> panels;  // [out, in]
  std::vector<float> bias;               // [out] or empty
  int output;                            // buffer, or Program::kLogits
  Epilogue::Kind kind;
  Activation activation;
};

struct Norm {
  std::vector<float> weight;
  float eps;
};

// What an adapter adds to the products of one linear operation: to that of a part, b h for the `b.cols` values of h from
// `from` on, where h is a x, each value times its scale. Formats of floats; x before it is rounded. With factors, the sum
// is multiplied by them before the bias.
struct LowRank {
  struct Part {
    int product;
    std::shared_ptr<const Panels> b;  // [out, rank]
    int from;
    std::vector<float> factors = {};  // [out] or empty; set_magnitude makes them
  };
  int operation;
  std::shared_ptr<const Panels> a;  // [sum of ranks, in]
  std::vector<float> scales;        // [sum of ranks]
  std::vector<Part> parts;
};

// Of grouped attention, query head h reading kv head h / (n_heads / kv heads of the layer).
struct AttentionSettings {
  int layer, n_heads;
  int rope;  // table by which q and k are rotated, -1: they are not
  float scale;
  Reach reach;
  float softcap;                       // 0: none
  std::vector<float> temperature;      // [context] or empty
  std::optional<Norm> q_norm, k_norm;  // [Dh], of each head before it is rotated
};

// The matrices of routed experts, one of each for every expert, each kind in one format.
struct ExpertMatrices {
  std::vector<std::shared_ptr<const Panels>> gate, up;  // [hidden, dim]
  std::vector<std::shared_ptr<const Panels>> down;      // [dim, hidden]
};

class Program {
 public:
  static constexpr int kLogits = -1;  // the output of the whole program, [R, V]

  // widths: of the buffers. layers: of the cache. Starts threads - 1 threads. Throws std::invalid_argument,
  // std::bad_alloc, std::system_error.
  Program(Isa isa, int threads, int context, int vocab, KvFormat kv, const std::vector<KvShape>& layers, int n_blocks,
          const std::vector<int>& widths);
  ~Program();

  // ---- building: each appends one operation. Throws std::invalid_argument where shapes do not fit. ----

  // output [T, D] = rows of `table` [V, D] for the batch's tokens, times `scale`
  void add_embed(std::shared_ptr<const Panels> table, float scale, int output);

  // output = norm(input), or, where `added`, output += norm(input); another buffer.
  void add_norm(int input, Norm norm, int output, bool added);

  // Each product of norm(input) or, without a norm, of input. A product of Kind::gate multiplies the activation of what
  // the product before it has stored, so the two have one output.
  void add_linear(int input, std::optional<Norm> norm, std::vector<Product> products);

  // cos, sin: [context, dim/2], copied. Returns the number of the table.
  int add_rope(const float* cos, const float* sin, int dim);

  // Norms and rotates q and k, writes k and v to the cache, attends.
  void add_attention(int q, int k, int v, int output, AttentionSettings settings);

  // output += what the experts that `routing` chooses by `logits` [T, E] give for input. selection_bias: [E], or empty.
  void add_experts(int input, int logits, int output, ExpertMatrices matrices, Activation activation,
                   const Routing& routing, std::vector<float> selection_bias);
  // output [T, n * rows] = by head h of n: matrices[h] [rows, cols] times part h of input [T, n * cols]. All of one format.
  void add_head_linear(int input, std::vector<std::shared_ptr<const Panels>> matrices, int output);

  // Latent attention: norms latent [T, latent_dim], rotates q_rope [T, n_heads * rope_dim] and k_rope [T, rope_dim] by
  // table `rope`, writes latent and key to the cache of `layer`, attends. The queries q [T, n_heads * latent_dim] are
  // multiplied by the latents as they are, and replaced by the latents that they attend to.
  void add_latent_attention(int q, int q_rope, int latent, int k_rope, int layer, int n_heads, int rope, float scale,
                            Norm norm);

  // hidden [N, D] = norm(input) of the batch's hidden rows; once, before `select`.
  void add_hidden(int input, Norm norm);

  // Keeps of these buffers the batch's rows; what follows has R rows, and nothing else may be read any more.
  void add_select(std::vector<int> buffers);

  // logits = cap tanh(logits / cap), after they were made
  void add_softcap(float cap);

  // ---- adapters, at any time; who waits for a step that runs ----

  // What a sequence may choose as `number` from now on: one for each operation that it changes. Throws
  // std::invalid_argument for numbers below 1 or taken, and where shapes do not fit.
  void add_adapter(int number, std::vector<LowRank> changes);
  // That adapter's change of a product gives each row of the matrix, with what is added to it, this length [out] (DoRA);
  // a row of zeros stays one. Before the number's first step. Throws std::invalid_argument where there is no such change
  // or the length does not fit, std::runtime_error as `step`.
  void set_magnitude(int number, int operation, int product, const std::vector<float>& magnitude);
  // Frees it. Throws std::invalid_argument where there is none.
  void remove_adapter(int number);

  // ---- running ----

  // logits [R, V], hidden [N, D]. Throws std::invalid_argument for a batch that does not fit, before anything is computed;
  // std::bad_alloc where a larger batch than ever before finds no memory; std::runtime_error in a process that was
  // forked since. One step at a time; others wait.
  void step(const BatchView& batch, float* logits, float* hidden);

  // Both in range, otherwise std::invalid_argument.
  void copy_block(int source, int target);

  // ---- inspection ----

  // One line per operation.
  std::vector<std::string> describe() const;
  // Whether steps add the time of each operation to times(); resets them.
  void profile(bool on);
  // Nanoseconds in each operation since profile(true).
  std::vector<std::int64_t> times();
  std::size_t cache_bytes() const { return cache_.bytes(); }
  int context() const { return context_; }
  int vocab() const { return vocab_; }
  int hidden_width() const { return hidden_width_; }  // D, 0 where no hidden states are computed

 private:
  struct Embed {
    std::shared_ptr<const Panels> table;
    float scale;
    int output;
  };
  struct Normed {
    int input;
    Norm norm;
    int output;
    bool added;
  };
  struct Range {
    int product;
    std::int64_t from, to;  // panels
  };
  struct Linear {
    int input;
    std::int64_t cols;
    std::optional<Norm> norm;
    std::vector<Product> products;
    bool quantized, floating;              // which forms of the input the products want
    std::vector<std::vector<Range>> fair;  // per worker: equal shares of the bytes, for few rows
    std::vector<Range> chunks;             // small shares, for many rows
  };
  struct Attend {
    int q, k, v, output;
    int q_rope;  // latent attention: k is the latent, v the key that is rotated; -1: this is grouped attention
    int n_kv_heads, key_dim, value_dim;
    AttentionSettings settings;
    bool latent() const { return q_rope >= 0; }
  };
  struct HeadLinear {
    int input, output;
    std::vector<std::shared_ptr<const Panels>> matrices;
  };
  struct Experts {
    int input, logits, output;
    std::int64_t dim, hidden;
    ExpertMatrices matrices;
    Activation activation;
    Routing routing;
    std::vector<float> selection_bias;
    bool quantized, floating;  // which forms of the input gate and up want
    // Whether the inputs lie side by side as floats before they are multiplied.
    bool gathers() const { return floating || routing.weighs_input; }
  };
  struct Hidden {
    int input;
    Norm norm;
  };
  struct Select {
    std::vector<int> buffers;
  };
  struct Softcap {
    float cap;
  };
  using Operation = std::variant<Embed, Normed, Linear, Attend, HeadLinear, Experts, Hidden, Select, Softcap>;

  struct RopeTable {
    std::vector<float> cos, sin;
    int dim;
  };
  struct Buffer {
    int width;
    Scratch memory;
  };
  struct Worker {
    Scratch matmul, attention, normed, quantized, terms;
    std::vector<RowChange> changes;  // of a product's rows
    RoutingScratch routing;
    Dispatch dispatch;  // of few tokens
  };
  struct Rows {
    int from, to;
  };
  using Adapter = std::vector<LowRank>;  // by operation; without parts where it changes nothing
  struct Run {  // rows next to each other that have one adapter
    const Adapter* adapter;
    int from, to;
  };
  struct TokenRange {  // consecutive tokens of one sequence
    int sequence, first, n;
  };
  struct HeadGroup {  // query heads that share one pass over a kv head
    int kv_head, first, n;
  };
  struct Segments {  // a row's place in partials_, in segments of all heads; n == 1: it has none
    int at, n;
  };

  void check_alive() const;
  float* row(int buffer, int index);
  int width(int buffer) const;
  void check_buffer(int buffer, const char* what) const;
  void check(const BatchView& batch);
  void prepare(const BatchView& batch);
  void prepare(const Experts& op, int n_tokens);
  void prepare_adapters();
  void run(unsigned worker);
  void run(const Embed& op, std::size_t index, unsigned worker);
  void run(const Normed& op, std::size_t index, unsigned worker);
  void run(const Linear& op, std::size_t index, unsigned worker);
  void run(const Attend& op, std::size_t index, unsigned worker);
  void run(const Experts& op, std::size_t index, unsigned worker);
  void run_few(const Experts& op, unsigned worker);
  void run_many(const Experts& op, std::size_t index, unsigned worker);
  void run(const HeadLinear& op, std::size_t index, unsigned worker);
  void run(const Hidden& op, std::size_t index, unsigned worker);
  void run(const Select& op, std::size_t index, unsigned worker);
  void run(const Softcap& op, std::size_t index, unsigned worker);
  // The next of n items of a phase (0, 1) of the operation at `index`: a worker's own share of them first, then what the
  // others have not begun; -1: none is left.
  int take(std::size_t index, int phase, unsigned worker, int n);
  // rows.from: a multiple of the tile of `quantized`.
  void multiply(const Linear& op, std::size_t index, const Range& range, const Rows& rows, const Quantized& quantized,
                const float* x, Worker& mine);
  // What the adapter of a run changes of an operation; null: nothing.
  static const LowRank* change(const Run& run, std::size_t index) {
    return (*run.adapter)[index].parts.empty() ? nullptr : &(*run.adapter)[index];
  }
  // Whether some row's adapter changes the operation.
  bool adapts(std::size_t index) const;
  // This worker's share of h, of LowRank, in projected_; x: the operation's input as floats.
  void project(std::size_t index, const float* x, unsigned worker);
  // What adapters change in the product's panels range.from … range.to, in `mine`: for `Epilogue::changes`; null where
  // they change nothing.
  const RowChange* changes(std::size_t index, int product, const Range& range, const Rows& rows, Worker& mine);
  void add_attend(Attend op);
  HeadTransform transform(const Attend& op, const std::optional<Norm>& norm) const;
  // y of rows' products with some panels; x: where these are floats, rows side by side.
  void multiply(const PanelsView& w, const Quantized& quantized, const float* x, std::int64_t n_rows, std::int64_t from,
                std::int64_t to, float* y, std::size_t ldy, const Epilogue& epilogue, Worker& mine);
  void route(const Experts& op, int token, Dispatch& dispatch, Worker& mine);
  void take_rows(const Experts& op, const Dispatch& dispatch, const Rows& rows, float* gathered, void* rounded);
  void round_hidden(const Experts& op, const Dispatch& dispatch, const Rows& rows, void* rounded);
  Quantized rounded_rows(const Dispatch::Group& group, std::int64_t cols, std::size_t at, void* rounded) const;
  void round_row(const Dispatch::Group& group, int index, const float* x, const Quantized& out);
  void multiply_up(const Experts& op, const Dispatch::Group& group, std::int64_t from, std::int64_t to,
                   const float* gathered, void* rounded, Worker& mine);
  void multiply_down(const Experts& op, const Dispatch::Group& group, std::int64_t from, std::int64_t to, void* rounded,
                     Worker& mine);
  void add_given(const Experts& op, Dispatch& dispatch, int token, std::int64_t from, std::int64_t to);
  int n_groups(const Attend& op, int n_items) const;
  HeadGroup group(const Attend& op, int index, int n) const;
  KvView kv_view(const Attend& op, int sequence, int head);
  void write_kv(const Attend& op, int sequence, int token, int head, Worker& mine);
  float* partial(const Attend& op, const Segments& segments, int segment, const HeadGroup& heads);
  std::string line(const Embed& op) const;
  std::string line(const Normed& op) const;
  std::string line(const Linear& op) const;
  std::string line(const Attend& op) const;
  std::string line(const Experts& op) const;
  std::string line(const HeadLinear& op) const;
  std::string line(const Hidden& op) const;
  std::string line(const Select& op) const;
  std::string line(const Softcap& op) const;
  static std::string name(const PanelsView& view);

  const Kernels& kernels_;
  const int context_, vocab_;
  KvCache cache_;
  std::vector<Buffer> buffers_;
  std::vector<RopeTable> ropes_;
  std::vector<Operation> operations_;
  std::vector<Worker> workers_;
  std::int64_t max_cols_ = 0;  // widest quantised input
  std::int64_t max_normed_cols_ = 0;
  int hidden_width_ = 0;
  std::size_t attention_floats_ = 0;
  std::size_t partial_floats_ = 0;  // of one segment, all heads
  int query_rows_ = kMaxQueryRows;  // rows of a query tile
  std::vector<Reach> reaches_;  // of all layers, each once
  std::map<int, Adapter> adapters_;
  // Of the operations that any adapter changes or has changed: ranks, and panels that a worker takes of few, many rows.
  std::int64_t max_rank_ = 0, max_few_panels_ = 0, max_many_panels_ = 0;

  // Of the current step.
  std::mutex mutex_;
  BatchView batch_{};
  float* logits_ = nullptr;
  float* hidden_states_ = nullptr;
  int n_rows_ = 0;       // T, after `select` R; equal on all workers, written between barriers
  bool single_ = false;  // every sequence has one token
  std::vector<Run> token_runs_, row_runs_;
  const std::vector<Run>* runs_ = &token_runs_;  // after `select` row_runs_; as n_rows_
  std::vector<TokenRange> tiles_;    // query tiles, at most query_rows_ each
  std::vector<TokenRange> writes_;   // new tokens by cache block
  std::vector<Segments> segments_;   // per sequence, where single_
  int n_partials_ = 0;
  Scratch quantized_, normed_, partials_;
  Scratch projected_;  // [T, max_rank_]
  Dispatch dispatch_;         // of more than kFew tokens
  Scratch hidden_, given_;    // of experts: per row, what lies between the matrices, and what comes out
  std::unique_ptr<std::atomic<int>[]> next_;  // per operation, phase (two) and worker: items taken; see take
  std::size_t n_counters_ = 0;
  std::vector<std::uint64_t> written_;        // per block: step in which it was written last
  std::uint64_t n_steps_ = 0;
  bool profiling_ = false;
  std::vector<std::int64_t> times_;

  std::unique_ptr<Pool> pool_;  // last: its threads end before the rest goes
};

}  // namespace dapji
