#pragma once

// The state that compression adds to a llama_kv_cache: scoring, and layers of different lengths.
// A llama_kv_cache without it (kvc == nullptr) runs llama.cpp's own code only.
//
// Layers are aligned on the right. Cells [0, n_max) hold composites, n_max = max over layers of n_kept, and new
// tokens follow. Layer l has no rows for the cells below off = n_max - n_kept[l]: cell i is its row i - off.

#include "llama-kvc.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct llama_context;
struct llm_graph_context;

class llama_kvc {
public:
    explicit llama_kvc(llama_kv_cache & kv);

    struct plan {
        uint32_t                 n_tokens;
        uint32_t                 n_room;
        std::vector<uint32_t>    n_kept; // per cached layer
        std::vector<const int32_t *> cells;
        llama_kvc_gather_t       gather;
    };

    // part of every graph's key: changes with scoring, taps, biases, the kernel and the layers' sizes
    uint64_t epoch() const { return n_epoch; }

    //
    // scores
    //

    // throws std::bad_alloc and changes nothing if there is no memory for the scores
    void scores_begin(llama_kvc_agg agg, uint32_t n_cells, size_t max_bytes);
    void scores_end();

    bool scoring() const { return score_n_cells > 0; }

    // graph nodes on top of the model's own: score branches, and the masks and indices of composed layers
    size_t n_extra_nodes(uint32_t n_tokens) const;

    // flash attention of batches by our own kernel on the CPU, which is faster than ggml's and takes quantized rows
    void set_fast(bool on) { n_epoch += fast != on; fast = on; }

    // called for every attention that has been built: chooses the kernel and, while scoring, reduces the probabilities
    // over the query tokens into the layer's scores, which stay beside the layer. Without flash attention they are there to be read; on the CPU flash attention reduces them on its way
    // (ggml-cpu-kvc.h); on devices a side branch computes them again.
    //   cur: the attention's output, made from
    //   q [n_embd_head_k, n_head, n_tokens], k [n_embd_head_k, n_head_kv, n_kv], kq_mask [n_kv, n_tokens]
    void attend(const llm_graph_context & g, ggml_tensor * cur, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
            ggml_tensor * sinks, float kq_scale, int il) const;

    // [n_head][n_cells] of a layer, reduced over all query tokens so far
    void scores_get(uint32_t ikv, float * dst) const;

    uint32_t scores_n_cells() const { return score_n_cells; }

    //
    // probes
    //

    struct side_buffer {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor *           t = nullptr; // F32, where the layer's rows are
    };

    // from here on every decode writes its first n_tokens queries and attention outputs beside the layers
    // throws std::bad_alloc and changes nothing if there is no memory for them
    void taps_begin(bool queries, bool outputs, uint32_t n_tokens);
    void taps_end();

    bool tapping() const { return !tap_queries.empty() || !tap_outputs.empty(); }

    // F32 [n_embd_head*n_head, n_tokens], nullptr: not asked for
    const ggml_tensor * tap(uint32_t ikv, bool outputs) const;

    // added to the logits of a layer's rows from now on, [n_head_kv][n_rows]; attention is then not fused
    void set_bias(uint32_t ikv, const float * bias, uint32_t n_rows);
    void drop_bias();

    // the bias that attention over k [n_embd_head_k, n_head_kv, n_kv] gets, kq_b if there is none of ours
    ggml_tensor * bias(ggml_context * ctx, ggml_tensor * kq_b, const ggml_tensor * k, float kq_scale, int32_t il) const;

    // RoPE of rows [n_rows][n_embd_head_k] for the positions pos as keys are cached, Hadamard rotation included, or back; in place
    void rope_rows(const llama_context & lctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) const;

    //
    // layers of different lengths
    //

    bool     composed() const { return n_past > 0; }
    uint32_t n_composed() const { return n_past; }
    bool     active()   const { return composed() || n_alloc < kv.get_size(); }

    // cells to allocate at least, from the next update on; what is not needed any more is given back when it is empty
    void reserve(uint32_t n_cells) { n_reserved = n_cells; }
    // at once, for a state that is about to be read; false: no memory
    bool reserve_rows(uint32_t n_cells);

    uint32_t n_cells_alloc() const { return n_alloc; }
    uint32_t n_rows_used(uint32_t ikv) const;
    uint32_t n_cells_used() const;
    size_t   n_bytes(uint32_t ikv) const;

    // empty string: the cache is what compose needs
    std::string check_compose(uint32_t n_tokens) const;

    void set_plan(plan p) { pending_plan = std::make_unique<plan>(std::move(p)); }
    void drop_plan() { pending_plan.reset(); }

    // llama_memory_i protocol: a change is noted first, carried out by init_update() + update()
    bool pending() const;
    void apply_pending();

    // true if the cache can take these slots, else the growth is noted
    bool fits(const llama_kv_cache::slot_info_vec_t & sinfos);

    // composite cells belong to no single position: a range that starts inside of them cannot go
    bool can_seq_rm(llama_pos p0, llama_pos p1) const;

    // true, and an error in the log, if the cache is composed and so cannot do what it is asked for
    bool refuses(const char * what) const;

    // a composed cache's state begins with this instead of the number of streams
    static constexpr uint32_t state_magic = 0x3143564b; // "KVC1"

    void state_write(llama_io_write_i & io) const;
    // makes an empty cache with the layers of the state, for its rows to be read into; throws if it is another model's
    void state_read(llama_io_read_i & io);

    // ranges of cells as ranges of a layer's rows
    std::vector<std::pair<uint32_t, uint32_t>> rows(const std::vector<std::pair<uint32_t, uint32_t>> & cells, uint32_t il) const;

    ggml_tensor * get_k(ggml_context * ctx, int32_t il, uint32_t n_kv) const;
    ggml_tensor * get_v(ggml_context * ctx, int32_t il, uint32_t n_kv) const;

    // index inputs hold one column for every distinct (offset, rows)
    ggml_tensor * new_idxs(ggml_context * ctx, int64_t n) const;
    ggml_tensor * idxs    (ggml_context * ctx, ggml_tensor * idxs, int32_t il) const;
    void      set_k_idxs  (ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const;
    void      set_v_idxs  (ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const;

    // columns [off, n_kv) of the shared mask, made once per offset: cache is the graph's own list of them
    ggml_tensor * mask(ggml_context * ctx, ggml_tensor * kq_mask, std::vector<std::pair<uint32_t, ggml_tensor *>> & cache, int32_t il) const;

private:
    struct group { uint32_t off; uint32_t n_rows; };

    // one for every cached layer, [ne0, ne1] = shape(il); throws std::bad_alloc
    std::vector<side_buffer> side_buffers(const char * name, const std::function<std::pair<int64_t, int64_t>(int32_t)> & shape) const;

    void copy_taps(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * cur, float kq_scale, uint32_t ikv) const;

    int64_t score_block(int64_t n_kv, int64_t n_group, int64_t n_tokens) const;

    uint32_t ikv_of(int32_t il) const { return kv.map_layer_ids.at(il); }
    uint32_t n_rows(uint32_t ikv) const { return (uint32_t) kv.layers[ikv].k->ne[1]; }

    // cells that a cache without contents has
    uint32_t n_empty() const { return std::min(kv.get_size(), std::max(n_start, n_reserved)); }

    // cells that every layer has room for
    uint32_t n_cells_of_all() const;

    void compose();
    void resize(uint32_t n_alloc_new);
    // moves rows into tensors of n_rows_new rows: the gathered ones, or the first n_move if there is no gather
    // false: no memory for the new tensors, the layer is as it was
    bool rebuild(uint32_t ikv, uint32_t n_rows_new, uint32_t n_move, const int32_t * cells, llama_kvc_gather_t gather);
    // the same within the tensors that the layer has; stage has room for one of them if it is not in host memory
    void gather_in_place(uint32_t ikv, uint32_t n_kept, const int32_t * cells, llama_kvc_gather_t gather, std::vector<uint8_t> & stage);
    void set_layout(uint32_t n_alloc_new);
    void trim() const;

    llama_kv_cache & kv;

    uint64_t n_epoch = 1;

    static constexpr int64_t fast_n_tokens = 16; // a smaller batch is ggml's

    bool fast = false;

    llama_kvc_agg score_agg       = LLAMA_KVC_AGG_MAX;
    uint32_t      score_n_cells   = 0;
    size_t        score_max_bytes = 0;
    std::vector<side_buffer> score_buffers; // per cached layer [n_cells, n_head]

    std::vector<side_buffer> tap_queries;   // per cached layer [n_embd_head_k*n_head, n_tokens]
    std::vector<side_buffer> tap_outputs;   // per cached layer [n_embd_head_v*n_head, n_tokens]
    std::vector<side_buffer> biases;        // per cached layer [n_cells, n_head]

    uint32_t n_past     = 0;              // tokens composed, 0: not composed
    uint32_t n_start    = 0;              // cells of an empty cache
    uint32_t n_alloc    = 0;
    uint32_t n_reserved = 0;
    uint32_t n_wanted   = 0;              // cells that the last batch did not fit into

    std::vector<uint32_t> offs;           // per cached layer
    std::vector<uint32_t> group_of;       // per cached layer
    std::vector<group>    groups;

    std::unique_ptr<plan> pending_plan;
};

// the cache of a memory that compression can work on: a plain one, or the full-attention half of one with sliding windows
llama_kv_cache * llama_kvc_cache(llama_memory_i * memory);

// its compression state, nullptr if it has none
llama_kvc * llama_kvc_get(llama_memory_i * memory);

// rows that the layers of a new cache of kv_size cells start with (llama_kvc_set_start_cells)
uint32_t llama_kvc_start_rows(const llama_model & model, uint32_t kv_size);
