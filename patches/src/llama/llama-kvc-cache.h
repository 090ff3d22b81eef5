#pragma once

// The state that compression adds to a llama_kv_cache. A cache without it (kvc == nullptr) runs llama.cpp's own code only.
//
// Layers are aligned on the right. n_max is the largest n_kept of all layers. Cells [0, n_max) hold composites, and new
// tokens follow. Layer ikv has no rows for the cells below off = n_max - n_kept[ikv], so cell i is its row i - off. A
// composed cache can be composed again: then its rows are composites and the tokens behind them.
//
// ikv counts the layers that have a cache, il counts all layers of the model; several of these may read the rows of one ikv.
//
// llama-kvc-cache.cpp    finds the cache of a memory; what is supported, what a composed cache refuses
// llama-kvc-layout.cpp   offsets, sizes and groups of the layers
// llama-kvc-layer.cpp    moves the rows of one layer, within its tensors or into new ones
// llama-kvc-compose.cpp  applies a plan
// llama-kvc-growth.cpp   makes room, and gives it back
// llama-kvc-state.cpp    saves and loads the layout
// llama-kvc-graph.cpp    views, indices and masks of a graph
// llama-kvc-joint.cpp    one token for each of several contexts
// llama-kvc-scores.cpp   chooses the attention kernel; collects attention scores
// llama-kvc-probe.cpp    queries and outputs of attention; a bias on its logits
// llama-kvc-rope.cpp     the model's RoPE of given rows

#include "llama-kvc.h"
#include "llama-kvc-buffer.h"
#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llm_graph_context;

class llama_kvc {
public:
    explicit llama_kvc(llama_kv_cache & kv);

    // from, to of ranges of cells or rows; to is exclusive
    using ranges = std::vector<std::pair<uint32_t, uint32_t>>;

    // Part of every graph's key. It changes with whatever changes a graph: scoring, taps, biases, the kernel, the layout.
    uint64_t epoch() const { return n_epoch; }

    //
    // compose
    //

    struct plan {
        uint32_t                     n_tokens;
        uint32_t                     n_tail; // last tokens, which stay as they are in every head
        uint32_t                     n_room; // free cells to allocate behind the composites
        std::vector<uint32_t>        n_kept; // [n_layer]
        std::vector<const int32_t *> rows;   // [n_layer] of [n_head_kv][n_kept]; the caller's memory
        llama_kvc_gather_t           gather;
    };

    bool     composed()   const { return n_past > 0; }
    uint32_t n_composed() const { return n_past; }

    // returns why the cache is not what compose needs, or an empty string
    std::string check_compose(uint32_t n_tokens) const;

    // the next update applies the plan
    void set_plan(plan p) { pending_plan = std::make_unique<plan>(std::move(p)); }
    void drop_plan() { pending_plan.reset(); }

    // Returns false if the range starts among the composites: they belong to no single position, so none can be removed.
    bool can_seq_rm(llama_pos p0, llama_pos p1) const;

    // returns true and logs an error if the cache is composed, so that it cannot do what the caller wants
    bool refuses(const char * what) const;

    //
    // layout
    //

    // The next batch begins at position pos: llama.cpp wants it directly after the last position that it is told. -1: no gap
    void skip_to(llama_pos pos) { skip_pos = pos; }

    // returns what llama.cpp is told: the last position of a sequence, or the one before the gap ends
    llama_pos last_pos(llama_pos pos) const { return pos < 0 ? pos : std::max(pos, skip_pos - 1); }

    // true: the layers have other rows than llama.cpp's own code expects
    bool active() const { return composed() || n_alloc < kv.get_size(); }

    uint32_t n_cells_alloc() const { return n_alloc; }
    uint32_t n_cells_used() const;
    uint32_t n_rows_used(uint32_t ikv) const;
    uint32_t n_rows_before(uint32_t ikv, uint32_t n_cells) const; // that cells [0, n_cells) have in this layer
    size_t   n_bytes(uint32_t ikv) const;

    //
    // growth
    //

    // Changes follow llama_memory_i's protocol: note the change first; init_update() and update() then carry it out.
    bool pending() const;
    void apply_pending(ggml_backend_sched_t sched = nullptr);

    // The next update allocates at least n_cells cells. A cache that is empty gives back what it does not need any more.
    void reserve(uint32_t n_cells);

    // allocates at once, because a state is read right after; returns false if there is no memory
    bool reserve_rows(uint32_t n_cells);

    // returns true if the cache has room for these slots; otherwise the next update makes room
    bool fits(const llama_kv_cache::slot_info_vec_t & sinfos);

    //
    // state
    //

    // The state of a composed cache begins with this number, that of another cache with its number of streams.
    static constexpr uint32_t state_magic = 0x3143564b; // "KVC1"

    void state_write(llama_io_write_i & io) const;

    // Gives an empty cache the layers of the state; the caller then reads its rows. Throws std::runtime_error if the state
    // belongs to another model or does not fit.
    void state_read(llama_io_read_i & io);

    // translates ranges of cells to ranges of the layer's rows
    ranges rows(const ranges & cells, uint32_t il) const;

    //
    // graph
    //

    // k: [n_embd_head_k, n_head_kv, n_kv - off, 1]; v: [n_embd_head_v, n_head_kv, n_kv - off, 1], or transposed
    ggml_tensor * get_k(ggml_context * ctx, int32_t il, uint32_t n_kv) const;
    ggml_tensor * get_v(ggml_context * ctx, int32_t il, uint32_t n_kv) const;

    // The indices of new rows: one column of n for every group of layers. idxs() returns the layer's column.
    ggml_tensor * new_idxs  (ggml_context * ctx, int64_t n) const;
    ggml_tensor * idxs      (ggml_context * ctx, ggml_tensor * idxs, int32_t il) const;
    void          set_k_idxs(ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const;
    void          set_v_idxs(ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const;

    // Returns columns [off, n_kv) of the mask that all layers share. cache is the graph's list of the masks it has so far,
    // so that each offset gets one mask.
    ggml_tensor * mask(ggml_context * ctx, ggml_tensor * kq_mask, std::vector<std::pair<uint32_t, ggml_tensor *>> & cache, int32_t il) const;

    // notes that graphs may have the tokens of n contexts; returns whether they become larger by it
    bool joins(uint32_t n);

    // upper limit of the nodes that compression adds to a graph of n_tokens tokens
    size_t n_extra_nodes(uint32_t n_tokens) const;

    //
    // attention
    //

    // on: batches use our own flash attention on the CPU, which is faster than ggml's and reads quantized rows
    void set_fast(bool on) { n_epoch = fast != on ? new_epoch() : n_epoch; fast = on; }

    // Every attention of a graph passes through here after llama.cpp has built it. Chooses the kernel, copies the tapped
    // vectors, and while scoring reduces the probabilities over the query tokens into the layer's scores.
    //   cur: the attention's output, made from
    //   q [n_embd_head_k, n_head, n_tokens], k [n_embd_head_k, n_head_kv, n_kv], kq_mask [n_kv, n_tokens]
    void attend(const llm_graph_context & g, ggml_tensor * cur, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
            ggml_tensor * sinks, float kq_scale, int il) const;

    // throws std::bad_alloc and changes nothing if there is no memory for the scores
    void scores_begin(llama_kvc_agg agg, uint32_t n_cells, size_t max_bytes);
    void scores_end();

    // dst: [n_head][scores_n_rows] of the layer, reduced over all query tokens so far; the maximum of all layers that read its rows
    void scores_get(uint32_t ikv, float * dst) const;

    bool     scoring()                   const { return score_n_cells > 0; }
    uint32_t scores_n_rows(uint32_t ikv) const { return score_n_rows[ikv]; } // only while scoring

    //
    // probes
    //

    // Every later decode copies the queries or attention outputs of its first n_tokens tokens.
    // Throws std::bad_alloc and changes nothing if there is no memory for them.
    void taps_begin(bool queries, bool outputs, uint32_t n_tokens);
    void taps_end();

    bool tapping() const { return !tap_queries.empty() || !tap_outputs.empty(); }

    // F32 [n_embd_head*n_head, n_tokens]; nullptr: this tap is off
    const ggml_tensor * tap(uint32_t ikv, bool outputs) const;

    // Adds bias [n_head_kv][n_rows] to the logits of the layer's rows from now on. llama.cpp then does not fuse attention.
    void set_bias(uint32_t ikv, const float * bias, uint32_t n_rows);
    void drop_bias();

    // returns our bias for attention over k [n_embd_head_k, n_head_kv, n_kv], or kq_b if we have none
    ggml_tensor * bias(ggml_context * ctx, ggml_tensor * kq_b, const ggml_tensor * k, float kq_scale, int32_t il) const;

    // Rotates rows [n_rows][n_embd_head_k] in place to the positions pos, as keys are cached, or back. Call it only if
    // rope_unknown() returns no reason against it.
    void rope_rows(uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) const;

    std::string rope_unknown(uint32_t ikv) const;

private:
    // layers that have the same offset and number of rows share their indices
    struct group { uint32_t off; uint32_t n_rows; };

    // The rows of a layer that stay: those in from [n_head_kv][n], or the first n if there is no gather. With a scheduler,
    // a device can gather its rows itself.
    struct kept_rows { uint32_t n; const int32_t * from; llama_kvc_gather_t gather; ggml_backend_sched_t sched; };

    // the tensors of one layer in a buffer of their own
    struct layer_tensors;

    // layout
    uint32_t ikv_of(int32_t il)    const { return kv.map_layer_ids.at(il); }
    uint32_t off   (uint32_t ikv)  const { return offs.empty() ? 0 : offs[ikv]; }
    uint32_t n_rows(uint32_t ikv)  const { return (uint32_t) kv.layers[ikv].k->ne[1]; }
    uint32_t n_cells_of_all() const; // cells that every layer has room for
    void     set_layout(uint32_t n_alloc_new);

    // layer; rebuild returns false and leaves the layer as it was if there is no memory for new tensors
    bool rebuild(uint32_t ikv, uint32_t n_rows_new, const kept_rows & rows);
    bool make_tensors(uint32_t ikv, uint32_t n_rows_new, layer_tensors & res) const;
    void move_tensors(uint32_t ikv, const layer_tensors & dst, const kept_rows & rows) const;
    void set_tensors(uint32_t ikv, layer_tensors & tensors);
    // stage has room for the larger tensor of the layer if they are in device memory
    void gather_in_place(uint32_t ikv, const kept_rows & rows, std::vector<uint8_t> & stage);

    // compose
    void     compose(ggml_backend_sched_t sched);
    size_t   n_stage_bytes() const;
    void     set_composites(uint32_t n_max, uint32_t n_tokens);

    // growth
    uint32_t n_empty() const { return std::min(kv.get_size(), std::max(n_start, n_reserved)); } // cells of an empty cache
    uint32_t padded(uint32_t n_cells) const; // a cache that is not composed has the sizes that llama.cpp's views have
    void     resize(uint32_t n_alloc_new);
    static void trim();

    // attention
    struct attention;
    int64_t score_block(int64_t n_kv, int64_t n_group, int64_t n_tokens) const;
    void    score_branch(const llm_graph_context & g, const attention & a, ggml_tensor * acc) const;
    void    note_rope(const ggml_tensor * q, uint32_t ikv) const;
    void    copy_taps(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * cur, float kq_scale, uint32_t ikv) const;

    // one for every cached layer, F32 [ne0(il), ne1]; throws std::bad_alloc
    template <typename F>
    std::vector<llama_kvc_buffer> buffers(const char * name, F && shape) const {
        std::vector<llama_kvc_buffer> res;
        for (const auto & layer : kv.layers) {
            const auto [ne0, ne1] = shape((int32_t) layer.il);
            res.emplace_back(layer.k, ne0, ne1, name, (int32_t) layer.il);
        }

        return res;
    }

    llama_kv_cache & kv;

    // no two caches ever have the same number, because a joint decode's graph has parts of several
    static uint64_t new_epoch();
    uint64_t n_epoch = new_epoch();

    uint32_t n_joint = 0; // contexts that were decoded for at once, at most

    uint32_t              n_past  = 0; // tokens that belong to composites, 0: not composed
    uint32_t              n_alloc = 0; // cells that every layer has room for
    std::vector<uint32_t> offs;        // [n_layer], empty: all are 0
    std::vector<uint32_t> group_of;    // [n_layer]
    std::vector<group>    groups;

    uint32_t n_start    = 0; // cells that the cache was created with
    uint32_t n_reserved = 0;
    uint32_t n_wanted   = 0; // cells for the last batch, which did not fit

    std::unique_ptr<plan> pending_plan;

    llama_pos skip_pos = -1; // where the next batch begins, -1: directly after the last token

    bool fast = false;

    llama_kvc_agg score_agg       = LLAMA_KVC_AGG_MAX;
    uint32_t      score_n_cells   = 0; // 0: not scoring
    size_t        score_max_bytes = 0;

    // rows of each layer when scoring began, whatever happens to the cache since
    std::vector<uint32_t> score_n_rows;

    // empty: off
    std::map<int32_t, llama_kvc_buffer> score_buffers; // [scores_n_rows, n_head] for every layer of the model that reads the cache

    // [n_layer] each, empty: off
    std::vector<llama_kvc_buffer> tap_queries;   // [n_embd_head_k*n_head, n_tokens]
    std::vector<llama_kvc_buffer> tap_outputs;   // [n_embd_head_v*n_head, n_tokens]
    std::vector<llama_kvc_buffer> biases;        // [n_cells, n_head]

    // The rotation of a layer's keys, as its graph has it. No model need be known for it.
    struct rotation {
        bool                    is_known = false;
        std::string             why;              // why it is not known; empty: no graph was built yet
        std::array<int32_t, 16> params = {};      // op_params of GGML_OP_ROPE, all 0: no rotation
        const ggml_tensor *     factors = nullptr;
        int64_t                 first   = 0;      // the rotated part of a head's key: its first element, and their number
        int64_t                 n_embd  = 0;
    };
    mutable std::vector<rotation> ropes; // [n_layer], noted while graphs are built
};

// Returns the cache of a memory that compression can work on: the layers with full attention, beside which there may be
// others with sliding windows or a recurrent state. nullptr: the memory is of another kind.
llama_kv_cache * llama_kvc_cache(llama_memory_i * memory);

// returns the cells of the layers with a sliding window, 0 if there are none
uint32_t llama_kvc_swa_cells(llama_memory_i * memory);

// returns whether the memory also has recurrent layers, which cannot go back
bool llama_kvc_is_recurrent(llama_memory_i * memory);

// returns the compression state of that cache, nullptr if it has none
llama_kvc * llama_kvc_get(llama_memory_i * memory);

// returns the rows that the layers of a new cache of kv_size cells start with (llama_kvc_set_start_cells)
uint32_t llama_kvc_start_rows(const llama_model & model, uint32_t kv_size);
