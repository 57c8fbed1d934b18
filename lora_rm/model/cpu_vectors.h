// 16 values at a time: what the C files share.

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

INLINE __m512 wide(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE __m512 load(const bf16 *x) { return wide(_mm256_loadu_si256((void *)x)); }

INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE void store(bf16 *to, __m512 x) { _mm256_storeu_si256((void *)to, narrow(x)); }

// To 5e-6 of itself, not less than 2^-126; of the two values that are compared the second is given back if
// one is no number
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm512_sub_ps(x, whole);
    const float factors[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                             2.4022651e-1f, 6.9314718e-1f, 1.0f};
    __m512 y = _mm512_set1_ps(factors[0]);
    for (int i = 1; i < 7; i++) y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(y, whole);
}
