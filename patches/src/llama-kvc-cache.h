#pragma once

// The state that compression adds to a llama_kv_cache: scoring, and layers of different lengths.
// A llama_kv_cache without it (kvc == nullptr) runs llama.cpp's own code only.
//
// Layers are aligned on the right. Cells [0, n_max) hold composites, n_max = max over layers of n_kept, and new
// tokens follow. Layer l has no rows for the cells below off = n_max - n_kept[l]: cell i is its row i - off.

#include "llama-kvc.h"
#include "llama-kv-cache.h"

#include <memory>
#include <string>
#include <vector>

struct llm_graph_context;

class llama_kvc {
public:
    explicit llama_kvc(llama_kv_cache & kv) : kv(kv) {}

    struct plan {
        uint32_t                 n_tokens;
        uint32_t                 n_room;
        std::vector<uint32_t>    n_kept; // per cached layer
        std::vector<const int32_t *> cells;
        llama_kvc_gather_t       gather;
    };

    // part of every graph's key: changes with scoring and with the layers' sizes
    uint64_t epoch() const { return n_epoch; }

    //
    // scores
    //

    void scores_begin(llama_kvc_agg agg, uint32_t n_cells);
    void scores_end();

    bool   scoring()       const { return score_n_cells > 0; }

    // graph nodes on top of the model's own: score branches, and the masks and indices of composed layers
    size_t n_extra_nodes() const;

    // side branch of attention: softmax(q*k), reduced over the query tokens, marked as output in g.res
    //   q [n_embd_head_k, n_head, n_tokens], k [n_embd_head_k, n_head_kv, n_kv], kq_mask [n_kv, n_tokens]
    void build_scores(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
            ggml_tensor * sinks, float kq_scale, int il) const;

    // after a graph has run: reduce its score outputs into the host's
    void collect(const std::vector<std::pair<int, ggml_tensor *>> & outputs, ggml_backend_sched_t sched, uint32_t n_tokens);

    // [n_head][n_cells] of a layer, reduced over all query tokens so far
    void scores_get(uint32_t ikv, float * dst) const;

    uint32_t scores_n_cells() const { return score_n_cells; }

    //
    // layers of different lengths
    //

    bool     composed() const { return n_past > 0; }
    uint32_t n_composed() const { return n_past; }
    bool     active()   const { return composed() || n_alloc < kv.get_size(); }

    uint32_t n_cells_alloc() const { return n_alloc; }
    uint32_t n_rows_used(uint32_t ikv) const;
    uint32_t n_cells_used() const;
    size_t   n_bytes(uint32_t ikv) const;

    // empty string: the cache is what compose needs
    std::string check_compose(uint32_t n_tokens) const;

    void set_plan(plan p) { pending_plan = std::make_unique<plan>(std::move(p)); }

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

    uint32_t ikv_of(int32_t il) const { return kv.map_layer_ids.at(il); }
    uint32_t n_rows(uint32_t ikv) const { return (uint32_t) kv.layers[ikv].k->ne[1]; }

    void compose();
    void resize(uint32_t n_alloc_new);
    // moves rows into tensors of n_rows_new rows: the gathered ones, or the first n_move if there is no gather
    // false: no memory for the new tensors, the layer is as it was
    bool rebuild(uint32_t ikv, uint32_t n_rows_new, uint32_t n_move, const int32_t * cells, llama_kvc_gather_t gather);
    // the same within the tensors that the layer has
    void gather_in_place(uint32_t ikv, uint32_t n_kept, const int32_t * cells, llama_kvc_gather_t gather);
    void set_layout(uint32_t n_alloc_new);
    void trim() const;

    llama_kv_cache & kv;

    uint64_t n_epoch = 1;

    llama_kvc_agg      score_agg     = LLAMA_KVC_AGG_MAX;
    uint32_t           score_n_cells = 0;
    uint64_t           score_n_query = 0;
    std::vector<size_t> score_offs; // [n_layer + 1] into score_data
    std::vector<float>  score_data;

    uint32_t n_past   = 0;                // tokens composed, 0: not composed
    uint32_t n_alloc  = kv.get_size();
    uint32_t n_wanted = 0;                // cells that the last batch did not fit into

    std::vector<uint32_t> offs;           // per cached layer
    std::vector<uint32_t> group_of;       // per cached layer
    std::vector<group>    groups;

    std::unique_ptr<plan> pending_plan;
};

// the compression state of a context's memory, nullptr if it has none
llama_kvc * llama_kvc_get(llama_memory_i * memory);
