// One graph for one token of each of several contexts. The weights are read once for all of them; only the attention, and
// what it stores, is done for each context in its own cache. So the caches may have layers of any lengths.

#include "llama-kvc.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kvc-cache.h"
#include "llama-kvc-guard.h"
#include "llama-model.h"

#include <algorithm>
#include <memory>
#include <vector>

using namespace llama_kvc_guard;

// what a graph sees as its memory: every token has a cache of its own
class joint_memory : public llama_kv_cache_context {
public:
    explicit joint_memory(std::vector<llama_memory_context_ptr> parts) :
        llama_kv_cache_context(LLAMA_MEMORY_STATUS_SUCCESS), parts(std::move(parts)) {
        for (const auto & part : this->parts) {
            kvc_parts.push_back(static_cast<const llama_kv_cache_context *>(part.get()));
        }
    }

    bool apply() override {
        return std::all_of(parts.begin(), parts.end(), [](const auto & part) { return part->apply(); });
    }

private:
    std::vector<llama_memory_context_ptr> parts;
};

// a friend of llama_context
class llama_kvc_joint {
public:
    llama_kvc_joint(llama_context * const * ctxs, const llama_token * tokens, const llama_pos * pos, uint32_t n) :
        tokens(tokens, tokens + n), pos(pos, pos + n) {
        for (uint32_t i = 0; i < n; ++i) {
            caches.push_back(get_cache(ctxs[i]));
            check(caches.back());
            if (std::count(ctxs, ctxs + i, ctxs[i])) {
                fail(LLAMA_KVC_ERR_ARGUMENT, format("context %u occurs twice", i));
            }
            const uint32_t n_vocab = leader().get_model().vocab.n_tokens();
            if (tokens[i] < 0 || (uint32_t) tokens[i] >= n_vocab) {
                fail(LLAMA_KVC_ERR_ARGUMENT, format("tokens[%u] = %d, the vocabulary has %u", i, tokens[i], n_vocab));
            }
            if (pos[i] != caches.back().kv.seq_pos_max(0) + 1) {
                fail(LLAMA_KVC_ERR_ARGUMENT, format("pos[%u] = %d, the last token is at %d", i, pos[i], caches.back().kv.seq_pos_max(0)));
            }
        }
    }

    void decode() {
        std::vector<llama_memory_context_ptr> parts;
        for (uint32_t i = 0; i < n(); ++i) {
            caches[i].ctx.synchronize();
            parts.push_back(find_slot(i));
        }
        for (const auto & c : caches) {
            if (c.ctx.output_reserve(1) == 0) {
                fail(LLAMA_KVC_ERR_MEMORY, "no memory for the logits");
            }
        }

        auto & ctx = leader();
        if (caches[0].kvc().joins(n())) {
            ctx.kvc_reserve(); // its graphs become larger
        }
        ctx.sched_reserve();
        ctx.n_outputs = n();

        joint_memory memory(std::move(parts));
        ggml_status  status;
        unless_done  undo{ *this };

        const auto * res = ctx.process_ubatch(batch(), LLM_GRAPH_TYPE_DEFAULT, &memory, status);
        if (!res || !res->get_logits()) {
            fail(status == GGML_STATUS_ALLOC_FAILED ? LLAMA_KVC_ERR_MEMORY : LLAMA_KVC_ERR_INTERNAL, "the graph failed");
        }
        take_logits(res->get_logits());
        undo.done = true;
    }

private:
    // after an error no context has the new token
    struct unless_done {
        llama_kvc_joint & joint;
        bool              done = false;

        ~unless_done() {
            for (uint32_t i = 0; !done && i < joint.n(); ++i) {
                joint.caches[i].ctx.get_memory()->seq_rm(0, joint.pos[i], -1);
                joint.caches[i].ctx.n_outputs = 0;
            }
        }
    };

    llama_context & leader() const { return caches[0].ctx; }
    uint32_t        n()      const { return caches.size(); }

    // control vectors belong to one context, but the graph is the leader's
    static bool has_vector(const llama_context & ctx) {
        for (uint32_t il = 0; il < ctx.get_model().hparams.n_layer(); ++il) {
            if (ctx.cvec && ctx.cvec->tensor_for(il)) {
                return true;
            }
        }

        return false;
    }

    void check(const cache & c) const {
        const auto & model = c.ctx.get_model();
        if (dynamic_cast<llama_kv_cache *>(c.ctx.get_memory()) == nullptr || model.hparams.is_mla() ||
            model.hparams.indexer_head_size > 0 || model.hparams.n_pos_per_embd() != 1) {
            fail(LLAMA_KVC_ERR_UNSUPPORTED, "only models whose memory is a plain cache of keys and values can decode together");
        }
        if (&model != &leader().get_model()) {
            fail(LLAMA_KVC_ERR_ARGUMENT, "the contexts have different models");
        }
        if (c.ctx.get_cparams().flash_attn != leader().get_cparams().flash_attn || *c.ctx.loras != *leader().loras ||
            has_vector(c.ctx) || !c.ctx.sampling.samplers.empty()) {
            fail(LLAMA_KVC_ERR_UNSUPPORTED, "the contexts have different adapters or attention");
        }
        if (c.kvc().scoring() || c.kvc().tapping()) {
            fail(LLAMA_KVC_ERR_STATE, "scores or taps are on");
        }
    }

    // as in llama_context::decode: the cache may have to grow first
    llama_memory_context_ptr find_slot(uint32_t i) {
        auto & ctx = caches[i].ctx;

        llama_batch_ext one(&ctx);
        const int32_t at = one.add_token(0);
        one.set_token_id(at, tokens[i]);
        one.set_token_pos(at, &pos[i]);
        one.set_output(at, true);
        if (!ctx.balloc->init(one, ctx.get_model().vocab, false)) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("context %u does not take the token", i));
        }
        ctx.memory_update(false);
        for (const bool again : { false, true }) {
            auto slot = ctx.get_memory()->init_batch(*ctx.balloc, 1, false);
            if (slot && slot->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
                return slot;
            }
            if (again || !ctx.memory_update(true)) {
                break;
            }
        }
        fail(LLAMA_KVC_ERR_STATE, format("the cache of context %u is full", i));
    }

    // the tokens of all contexts; their sequences are told apart by joint_memory
    llama_ubatch batch() {
        auto data = std::make_shared<llama_ubatch::data_t>();
        data->token = tokens;
        data->pos   = pos;
        data->n_seq_id.assign(n(), 1);
        data->seq_id_data.assign(n(), 0);
        data->seq_id_unq = { 0 };
        data->seq_idx.assign(LLAMA_MAX_SEQ, -1);
        data->seq_idx[0] = 0;
        data->output.assign(n(), 1);
        for (auto & id : data->seq_id_data) {
            data->seq_id.push_back(&id);
        }

        return {
            /*.b_equal_seqs =*/ 0,
            /*.n_tokens     =*/ n(),
            /*.n_seq_tokens =*/ 1,
            /*.n_seqs       =*/ n(),
            /*.n_seqs_unq   =*/ 1,
            /*.n_pos        =*/ 1,
            /*.token        =*/ data->token.data(),
            /*.embd         =*/ nullptr,
            /*.pos          =*/ data->pos.data(),
            /*.n_seq_id     =*/ data->n_seq_id.data(),
            /*.seq_id       =*/ data->seq_id.data(),
            /*.seq_id_unq   =*/ data->seq_id_unq.data(),
            /*.seq_idx      =*/ data->seq_idx.data(),
            /*.output       =*/ data->output.data(),
            /*.data         =*/ data,
        };
    }

    // gives every context its row, as if it had decoded alone
    void take_logits(ggml_tensor * t) {
        auto & ctx = leader();

        const size_t n_bytes = t->nb[1];
        auto *       backend = ggml_backend_sched_get_tensor_backend(ctx.get_sched(), t);
        for (uint32_t i = 0; i < n(); ++i) {
            ggml_backend_tensor_get_async(backend, t, caches[i].ctx.logits.data, i*n_bytes, n_bytes);
            caches[i].ctx.n_outputs     = 1;
            caches[i].ctx.output_ids[0] = 0;
            caches[i].ctx.output_swaps.clear();
        }
        ctx.synchronize(); // the other contexts do not know what to wait for
    }

    std::vector<cache>       caches;
    std::vector<llama_token> tokens;
    std::vector<llama_pos>   pos;
};

int32_t llama_kvc_decode_joint(llama_context * const * ctxs, const llama_token * tokens, const llama_pos * pos, uint32_t n) {
    return guarded([&] {
        if (!ctxs || !tokens || !pos || n == 0) {
            fail(LLAMA_KVC_ERR_ARGUMENT, "ctxs, tokens or pos is NULL, or n = 0");
        }

        llama_kvc_joint(ctxs, tokens, pos, n).decode();
    });
}
