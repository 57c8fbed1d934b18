// Norms, gated activations and rotary positions in bfloat16 on a CPU with AVX512-BF16, a pass over memory
// each; see cpu_kernels.py.
//
// Everything is computed in float32 and rounded once. Rows are a multiple of 16 values long.

#include <math.h>

#include "cpu_vectors.h"

#define EACH_ROW(count) _Pragma("omp parallel for schedule(static)") for (long row = 0; row < (count); row++)

// 1 / (1 + exp(-x))
INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// eights: of values, an even number
void gated(const bf16 *gate, const bf16 *up, bf16 *y, long eights) {
    EACH_ROW (eights / 2) {
        __m512 g = load(gate + 16 * row);
        store(y + 16 * row, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), load(up + 16 * row)));
    }
}

void gated_backward(const bf16 *gradient, const bf16 *gate, const bf16 *up, bf16 *of_gate, bf16 *of_up,
                    long eights) {
    EACH_ROW (eights / 2) {
        long i = 16 * row;
        __m512 dy = load(gradient + i), g = load(gate + i), s = sigmoid(g), silu = _mm512_mul_ps(g, s);
        store(of_up + i, _mm512_mul_ps(dy, silu));
        // s (1 + g (1 - s)) = s + silu (1 - s)
        __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
        store(of_gate + i, _mm512_mul_ps(_mm512_mul_ps(dy, load(up + i)), slope));
    }
}

void norm(const bf16 *x, const bf16 *weight, bf16 *y, float *scale, long rows, int size, float eps) {
    EACH_ROW (rows) {
        const bf16 *from = x + row * size;
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < size; i += 16) {
            __m512 value = load(from + i);
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        scale[row] = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
        for (int i = 0; i < size; i += 16)
            store(y + row * size + i,
                  _mm512_mul_ps(_mm512_mul_ps(load(from + i), _mm512_set1_ps(scale[row])), load(weight + i)));
    }
}

void norm_backward(const bf16 *gradient, const bf16 *x, const bf16 *weight, const float *scale, bf16 *of_x,
                   long rows, int size) {
    EACH_ROW (rows) {
        const bf16 *dy = gradient + row * size, *from = x + row * size;
        __m512 sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale[row]);
        for (int i = 0; i < size; i += 16)
            sum = _mm512_fmadd_ps(_mm512_mul_ps(load(dy + i), load(weight + i)), load(from + i), sum);
        // mean(w g n) / sqrt(...), of n = x / sqrt(...)
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / size * scale[row] * scale[row]);
        for (int i = 0; i < size; i += 16) {
            __m512 own =
                _mm512_fnmadd_ps(mean, load(from + i), _mm512_mul_ps(load(dy + i), load(weight + i)));
            store(of_x + row * size + i, _mm512_mul_ps(own, by));
        }
    }
}

INLINE __m512 load_some(const bf16 *x, __mmask16 which) { return wide(_mm256_maskz_loadu_epi16(which, x)); }

// (tokens, heads, 2 half) in any order of tokens and heads; sign: 1 turns, -1 turns back
void turned(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long tokens, int heads, int half,
            long x_token, long x_head, long y_token, long y_head, int sign) {
    EACH_ROW (tokens)
        for (int head = 0; head < heads; head++) {
            const bf16 *from = x + row * x_token + head * x_head, *c = cos + row * 2 * half,
                       *s = sin + row * 2 * half;
            bf16 *to = y + row * y_token + head * y_head;
            for (int i = 0; i < half; i += 16) {
                __mmask16 which = half - i < 16 ? (1u << (half - i)) - 1 : 0xffff;
                __m512 low = load_some(from + i, which), high = load_some(from + half + i, which);
                __m512 of_low = _mm512_mul_ps(high, load_some(s + (sign > 0 ? 0 : half) + i, which));
                __m512 of_high = _mm512_mul_ps(low, load_some(s + (sign > 0 ? half : 0) + i, which));
                low = _mm512_mul_ps(low, load_some(c + i, which));
                high = _mm512_mul_ps(high, load_some(c + half + i, which));
                low = sign > 0 ? _mm512_sub_ps(low, of_low) : _mm512_add_ps(low, of_low);
                high = sign > 0 ? _mm512_add_ps(high, of_high) : _mm512_sub_ps(high, of_high);
                _mm256_mask_storeu_epi16(to + i, which, narrow(low));
                _mm256_mask_storeu_epi16(to + half + i, which, narrow(high));
            }
        }
}
