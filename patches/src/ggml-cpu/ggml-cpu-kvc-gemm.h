#pragma once

// Matrix product of small float32 tiles.
//
// gemm() computes C[M][N] = A[M][K]*B[K][N], or adds that product to C if add is true. Element (m, k) of A is at
// m*am + k*ak, so A may be transposed. ldc and ldb are the numbers of floats from one row to the next.

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <cstring>

namespace {

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)

// one block of C: RM rows of RN vectors, which stay in registers
template <int RM, int RN>
inline void gemm_block(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t K, bool add) {
    GGML_F32_VEC acc[RM][RN];
    for (int i = 0; i < RM; ++i) {
        for (int j = 0; j < RN; ++j) {
            acc[i][j] = add ? GGML_F32_VEC_LOAD(C + i*ldc + j*GGML_F32_EPR) : GGML_F32_VEC_SET1(0.0f);
        }
    }
    for (int64_t k = 0; k < K; ++k) {
        GGML_F32_VEC b[RN];
        for (int j = 0; j < RN; ++j) {
            b[j] = GGML_F32_VEC_LOAD(B + k*ldb + j*GGML_F32_EPR);
        }
        for (int i = 0; i < RM; ++i) {
            const GGML_F32_VEC a = GGML_F32_VEC_SET1(A[i*am + k*ak]);
            for (int j = 0; j < RN; ++j) {
                acc[i][j] = GGML_F32_VEC_FMA(acc[i][j], b[j], a);
            }
        }
    }
    for (int i = 0; i < RM; ++i) {
        for (int j = 0; j < RN; ++j) {
            GGML_F32_VEC_STORE(C + i*ldc + j*GGML_F32_EPR, acc[i][j]);
        }
    }
}

template <int RM>
inline void gemm_rows(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t N, int64_t K, bool add) {
    int64_t j = 0;
    for (; j + 4*GGML_F32_EPR <= N; j += 4*GGML_F32_EPR) {
        gemm_block<RM, 4>(C + j, ldc, A, am, ak, B + j, ldb, K, add);
    }
    for (; j + GGML_F32_EPR <= N; j += GGML_F32_EPR) {
        gemm_block<RM, 1>(C + j, ldc, A, am, ak, B + j, ldb, K, add);
    }
    for (; j < N; ++j) {
        for (int i = 0; i < RM; ++i) {
            float sum = add ? C[i*ldc + j] : 0.0f;
            for (int64_t k = 0; k < K; ++k) {
                sum += A[i*am + k*ak]*B[k*ldb + j];
            }
            C[i*ldc + j] = sum;
        }
    }
}

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int GEMM_RM = 4;
#else
constexpr int GEMM_RM = 2; // 16 registers: 2*4 sums, 4 of B, 1 of A
#endif

inline void gemm(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t M, int64_t N, int64_t K, bool add) {
    int64_t i = 0;
    for (; i + GEMM_RM <= M; i += GEMM_RM) {
        gemm_rows<GEMM_RM>(C + i*ldc, ldc, A + i*am, am, ak, B, ldb, N, K, add);
    }
    for (; i < M; ++i) {
        gemm_rows<1>(C + i*ldc, ldc, A + i*am, am, ak, B, ldb, N, K, add);
    }
}

#else // no vectors of fixed length

inline void gemm(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t M, int64_t N, int64_t K, bool add) {
    for (int64_t i = 0; i < M; ++i) {
        if (!add) {
            memset(C + i*ldc, 0, N*sizeof(float));
        }
        for (int64_t k = 0; k < K; ++k) {
            const float a = A[i*am + k*ak];
            for (int64_t j = 0; j < N; ++j) {
                C[i*ldc + j] += a*B[k*ldb + j];
            }
        }
    }
}

#endif

} // namespace
