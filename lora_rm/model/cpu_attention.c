// Attention over a row of trees on a CPU with AVX512-BF16; cpu_attention.py says what is computed and
// compiles this for a head size D.
//
// A task is one tree and one group of query heads that share keys. Its keys' gradients are its own (those of
// the stem are added up behind all tasks, tree by tree), so sums have the same order whatever the number of
// threads, and need no locks. In a task tokens count from the stem: its own follow the stem's, so that a
// prompt and its first answer are one causal piece.
//
// Products are of bfloat16 in float32 sums, a tile of 6 rows and 64 columns in registers; the instruction
// multiplies two neighbours along the sum at once, so the right factor lies as "pairs": 32 bits hold a column
// of two rows.

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_vectors.h"

enum { ROWS = 96, KEYS = 64 };

#define EACH(i, n) _Pragma("GCC unroll 6") for (int i = 0; i < (n); i++)

typedef __m512 Tile[6][4];

typedef struct {
    int32_t start, stem, prompt, first_answer, num_answers;
} Tree;

typedef struct {
    const bf16 *query, *key, *value;  // (T, H, D), (T, G, D), (T, G, D)
    const Tree *trees;  // the longest first
    const int32_t *answer_lengths;
    bf16 *output;  // (T, H, D)
    float *sums;  // (T, H): the logarithm of the sum of a row's exponentials
    const bf16 *gradient;  // of the output; NULL in the forward pass
    bf16 *of_query, *of_key, *of_value;  // gradients
    int32_t num_trees, heads, groups;
    float scale;
    // of this file alone, 0 at first
    int32_t stem;
    float *of_stem;  // (2, trees, G, stem, D), not counted by the planner: what trees add to the gradients of the stem's keys and values
} Job;

// What a thread works with. The right factors of a task's products, as pairs:
typedef struct {
    int32_t *key_columns, *value_columns;  // K^T and V^T, (D / 2, width)
    int32_t *key_rows, *value_rows;  // K and V, (width / 2, D)
    float *of_key, *of_value;  // (width, D)
    long width;
    // and of a block of queries, each with its heads:
    bf16 query[ROWS * D], gradient[ROWS * D];
    int32_t query_rows[ROWS / 2 * D], gradient_rows[ROWS / 2 * D];
    float result[ROWS * D];  // output, or the query's gradient
    bf16 weights[ROWS * KEYS];  // P, or dS
    int32_t weight_rows[ROWS / 2 * KEYS], score_rows[ROWS / 2 * KEYS];  // P and dS
    float high[ROWS], total[ROWS], again[ROWS], sum[ROWS], product[ROWS];
    int end[ROWS];  // a row's query sees the keys before it
} Room;

INLINE __m512i paired(__m256i one, __m256i next) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16));
}

// Of the 16 keys from `key` those in [first, end)
INLINE __mmask16 seen(int key, int first, int end) {
    int low = first - key, high = end - key;
    unsigned mask = high >= 16 ? 0xffff : high <= 0 ? 0 : (1u << high) - 1;
    return low <= 0 ? mask : low >= 16 ? 0 : mask & (0xffffu << low);
}

// tile (m, 16 n) += left (m, pairs) right (pairs, 16 n); pair p of row i of `left` lies at i * row + p * step
INLINE void multiply(Tile tile, const int m, const int n, const void *left, long row, long step,
                     const int32_t *right, long width, int pairs) {
    const int32_t *at = left;
    for (int p = 0; p < pairs; p++, at += step, right += width) {
        __m512bh columns[4];
        EACH (j, n) columns[j] = (__m512bh)_mm512_loadu_si512(right + 16 * j);
        EACH (i, m) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(at[i * row]);
            EACH (j, n) tile[i][j] = _mm512_dpbf16_ps(tile[i][j], pair, columns[j]);
        }
    }
}

INLINE void clear(Tile tile, const int n) {
    EACH (i, 6)
        EACH (j, n) tile[i][j] = _mm512_setzero_ps();
}

// 16 n columns of: to (m, D) times `again`, if given, += left (m, pairs) right (pairs, D)
INLINE void add_columns(float *to, const float *again, const int m, const int n, const void *left, long row,
                        long step, const int32_t *right, int pairs) {
    Tile tile;
    EACH (i, m)
        EACH (j, n) {
            tile[i][j] = _mm512_loadu_ps(to + i * D + 16 * j);
            if (again) tile[i][j] = _mm512_mul_ps(tile[i][j], _mm512_set1_ps(again[i]));
        }
    multiply(tile, m, n, left, row, step, right, D, pairs);
    EACH (i, m)
        EACH (j, n) _mm512_storeu_ps(to + i * D + 16 * j, tile[i][j]);
}

INLINE void add_product(float *to, const float *again, const int m, const void *left, long row, long step,
                        const int32_t *right, int pairs) {
    for (int d = 0; d + 64 <= D; d += 64) add_columns(to + d, again, m, 4, left, row, step, right + d, pairs);
    if (D % 64)
        add_columns(to + D / 64 * 64, again, m, D % 64 / 16, left, row, step, right + D / 64 * 64, pairs);
}

INLINE void pair_rows(const bf16 *one, const bf16 *next, int32_t *to) {
    for (int d = 0; d < D; d += 16)
        _mm512_storeu_si512(
            to + d, paired(_mm256_loadu_si256((void *)(one + d)), _mm256_loadu_si256((void *)(next + d))));
}

// Scores of a block's queries and 16 n keys: the weights so far are multiplied by `again`, for a row's
// largest score may have grown
INLINE void weigh(const Job *job, Room *room, int rows, int key, int first, int stop, const int n) {
    for (int row = 0; row < rows; row += 6) {
        Tile tile;
        clear(tile, n);
        multiply(tile, 6, n, room->query + row * D, D / 2, 1, room->key_columns + key, room->width, D / 2);
        EACH (i, 6) {
            int end = room->end[row + i] < stop ? room->end[row + i] : stop;
            float before = room->high[row + i];
            __m512 high = _mm512_set1_ps(before), total = _mm512_setzero_ps();
            EACH (j, n) {
                tile[i][j] = _mm512_mul_ps(tile[i][j], _mm512_set1_ps(job->scale));
                high = _mm512_mask_max_ps(high, seen(key + 16 * j, first, end), high, tile[i][j]);
            }
            float now = _mm512_reduce_max_ps(high);
            EACH (j, n) {
                __m512 weight = exponential(_mm512_sub_ps(tile[i][j], _mm512_set1_ps(now)));
                weight = _mm512_maskz_mov_ps(seen(key + 16 * j, first, end), weight);
                total = _mm512_add_ps(total, weight);
                store(room->weights + (row + i) * KEYS + 16 * j, weight);
            }
            room->high[row + i] = now;
            room->again[row + i] = now == before ? 1.0f : expf(before - now);
            room->total[row + i] = room->total[row + i] * room->again[row + i] + _mm512_reduce_add_ps(total);
        }
    }
    for (int row = 0; row < rows; row += 6)
        add_product(room->result + row * D, room->again + row, 6, room->weights + row * KEYS, KEYS / 2, 1,
                    room->value_rows + key / 2 * D, 8 * n);
}

// P and dS of a block's queries and 16 n keys, and what they add to the gradients
INLINE void differentiate(const Job *job, Room *room, int rows, int key, int first, int stop, const int n) {
    for (int row = 0; row < rows; row += 6) {
        Tile tile;
        float kept[6][KEYS];
        clear(tile, n);
        multiply(tile, 6, n, room->query + row * D, D / 2, 1, room->key_columns + key, room->width, D / 2);
        EACH (i, 6) {
            int end = room->end[row + i] < stop ? room->end[row + i] : stop;
            EACH (j, n) {
                __m512 score = _mm512_fmsub_ps(tile[i][j], _mm512_set1_ps(job->scale),
                                               _mm512_set1_ps(room->sum[row + i]));
                _mm512_storeu_ps(kept[i] + 16 * j,
                                 _mm512_maskz_mov_ps(seen(key + 16 * j, first, end), exponential(score)));
            }
        }
        clear(tile, n);
        multiply(tile, 6, n, room->gradient + row * D, D / 2, 1, room->value_columns + key, room->width,
                 D / 2);
        EACH (i, 3)
            EACH (j, n) {
                __m256i weights[2], scores[2];
                EACH (k, 2) {
                    int own = 2 * i + k;
                    __m512 weight = _mm512_loadu_ps(kept[own] + 16 * j);
                    weights[k] = narrow(weight);
                    scores[k] = narrow(_mm512_mul_ps(
                        weight, _mm512_sub_ps(tile[own][j], _mm512_set1_ps(room->product[row + own]))));
                    _mm256_storeu_si256((void *)(room->weights + (row + own) * KEYS + 16 * j), scores[k]);
                }
                int at = (row / 2 + i) * KEYS + 16 * j;
                _mm512_storeu_si512(room->weight_rows + at, paired(weights[0], weights[1]));
                _mm512_storeu_si512(room->score_rows + at, paired(scores[0], scores[1]));
            }
    }
    for (int row = 0; row < rows; row += 6)
        add_product(room->result + row * D, 0, 6, room->weights + row * KEYS, KEYS / 2, 1,
                    room->key_rows + key / 2 * D, 8 * n);
    for (int k = 0; k < 16 * n; k += 4) {  // transposed: a key's pairs are those of rows
        add_product(room->of_key + (key + k) * D, 0, 4, room->score_rows + k, 1, KEYS, room->query_rows,
                    rows / 2);
        add_product(room->of_value + (key + k) * D, 0, 4, room->weight_rows + k, 1, KEYS, room->gradient_rows,
                    rows / 2);
    }
}

// Keys [first, stop), of which a row sees those before its end
static void meet(const Job *job, Room *room, int rows, int first, int stop) {
    for (int key = first & ~15; key < stop; key += KEYS) {
        int n = stop - key < KEYS ? (stop - key + 15) / 16 : 4;
#define CASE(n)                                                                 \
    case n:                                                                     \
        if (job->gradient) differentiate(job, room, rows, key, first, stop, n); \
        else weigh(job, room, rows, key, first, stop, n);                       \
        break;
        switch (n) { CASE(1) CASE(2) CASE(3) CASE(4) }
    }
}

// Queries [start, end) of an answer that began at `own`, having seen the `before` keys of stem and prompt
static void compute_block(const Job *job, Room *room, int group, int to_row, int before, int own, int start,
                          int end) {
    int shared = job->heads / job->groups, rows = (end - start) * shared, whole = (rows + 5) / 6 * 6;
    memset(room->result, 0, sizeof(float) * whole * D);
    for (int row = 0; row < whole; row++) {  // the last ones stand for nothing
        int token = start + (row < rows ? row : rows - 1) / shared;
        long head = (long)(token + to_row) * job->heads + group * shared + (row < rows ? row % shared : 0);
        room->end[row] = token + 1;
        memcpy(room->query + row * D, job->query + head * D, sizeof(bf16) * D);
        if (!job->gradient) {
            room->high[row] = -INFINITY;
            room->total[row] = 0;
            continue;
        }
        memcpy(room->gradient + row * D, job->gradient + head * D, sizeof(bf16) * D);
        if (row >= rows) memset(room->gradient + row * D, 0, sizeof(bf16) * D);
        room->sum[row] = row < rows ? job->sums[head] : INFINITY;
        __m512 product = _mm512_setzero_ps();
        for (int d = 0; d < D; d += 16)
            product = _mm512_fmadd_ps(load(room->gradient + row * D + d), load(job->output + head * D + d),
                                      product);
        room->product[row] = _mm512_reduce_add_ps(product);
    }
    if (job->gradient)
        for (int row = 0; row < whole; row += 2) {
            pair_rows(room->query + row * D, room->query + (row + 1) * D, room->query_rows + row / 2 * D);
            pair_rows(room->gradient + row * D, room->gradient + (row + 1) * D,
                      room->gradient_rows + row / 2 * D);
        }
    meet(job, room, whole, 0, before);
    meet(job, room, whole, own, end);
    for (int row = 0; row < rows; row++) {
        long head = (long)(start + row / shared + to_row) * job->heads + group * shared + row % shared;
        if (!job->gradient) job->sums[head] = room->high[row] + logf(room->total[row]);
        __m512 factor = _mm512_set1_ps(job->gradient ? job->scale : 1.0f / room->total[row]);
        bf16 *to = (job->gradient ? job->of_query : job->output) + head * D;
        for (int d = 0; d < D; d += 16)
            store(to + d, _mm512_mul_ps(_mm512_loadu_ps(room->result + row * D + d), factor));
    }
}

// Right factors of the keys or values of a tree, and zeros behind them
static void arrange(const Job *job, const bf16 *x, int group, const Tree *tree, int length, long width,
                    int32_t *columns, int32_t *rows) {
    static const bf16 zeros[D];
    for (int token = 0; token < length; token += 16) {
        const bf16 *of[16];
        for (int i = 0; i < 16; i++) {
            int at = token + i, row = at < tree->stem ? at : tree->start + at - tree->stem;
            of[i] = at < length ? x + ((long)row * job->groups + group) * D : zeros;
        }
        if (rows)
            for (int i = 0; i < 16; i += 2) pair_rows(of[i], of[i + 1], rows + (token + i) / 2 * D);
        if (columns)
            for (int d = 0; d < D / 2; d++)
                for (int i = 0; i < 16; i++) memcpy(columns + d * width + token + i, of[i] + 2 * d, 4);
    }
}

static void put_gradients(const Job *job, const float *from, float scale, bf16 *to, float *of_stem, int group,
                          int number, int length) {
    const Tree *tree = job->trees + number;
    int in_stem = tree->start && !tree->stem ? 0 : job->stem;  // the first tree holds the stem itself
    __m512 factor = _mm512_set1_ps(scale);
    for (int token = 0; token < length; token++)
        for (int d = 0; d < D; d += 16) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + token * D + d), factor);
            long row = token - tree->stem + tree->start;
            if (token < in_stem)
                _mm512_storeu_ps(of_stem + (((long)number * job->groups + group) * job->stem + token) * D + d,
                                 x);
            else store(to + (row * job->groups + group) * D + d, x);
        }
}

// Keys are computed 16 at a time
INLINE int whole_length(int length) { return (length + 15) / 16 * 16; }

// Its tokens and the stem's
static int tree_length(const Job *job, const Tree *tree) {
    int length = tree->stem + tree->prompt;
    for (int i = 0; i < tree->num_answers; i++) length += job->answer_lengths[tree->first_answer + i];
    return length;
}

static void compute_tree(const Job *job, Room *room, int group, int number) {
    const Tree *tree = job->trees + number;
    const int32_t *answers = job->answer_lengths + tree->first_answer;
    int before = tree->stem + tree->prompt, length = tree_length(job, tree),
        block = ROWS / (job->heads / job->groups);
    int is_backward = job->gradient != 0;
    arrange(job, job->key, group, tree, length, room->width, room->key_columns,
            is_backward ? room->key_rows : 0);
    arrange(job, job->value, group, tree, length, room->width, is_backward ? room->value_columns : 0,
            is_backward ? 0 : room->value_rows);
    if (is_backward) {
        memset(room->of_key, 0, sizeof(float) * whole_length(length) * D);
        memset(room->of_value, 0, sizeof(float) * whole_length(length) * D);
    }
    int to_row = tree->start - tree->stem;
    for (int i = 0, end = before; i < tree->num_answers; i++) {
        int own = i ? end : 0, first = i ? end : tree->stem;  // the prompt is computed with the first answer
        end += answers[i];
        for (int start = first; start < end; start += block)
            compute_block(job, room, group, to_row, i ? before : 0, own, start,
                          start + block < end ? start + block : end);
    }
    if (is_backward) {
        long half = (long)job->num_trees * job->groups * job->stem * D;
        put_gradients(job, room->of_key, job->scale, job->of_key, job->of_stem, group, number, length);
        put_gradients(job, room->of_value, 1.0f, job->of_value, job->of_stem + half, group, number, length);
    }
}

static void add_stems(const Job *job) {
    long size = (long)job->groups * job->stem * D;
    for (int which = 0; which < 2; which++) {
        const float *from = job->of_stem + which * job->num_trees * size;
        bf16 *to = which ? job->of_value : job->of_key;
#pragma omp parallel for
        for (long at = 0; at < size; at += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int tree = 0; tree < job->num_trees; tree++)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + tree * size + at));
            long group = at / D / job->stem, token = at / D % job->stem;
            store(to + (token * job->groups + group) * D + at % D, sum);
        }
    }
}

static int make_room(Room *room, int longest, int is_backward) {
    long width = whole_length(longest);
    room->width = width += width % 32 ? 0 : 16;  // rows 4096 bytes apart would share few lines of the cache
    long pairs = width / 2 * D;
    int32_t *all = aligned_alloc(64, sizeof(int32_t) * (is_backward ? 7 : 2) * pairs);
    room->key_columns = all;
    if (!all) return 0;
    room->value_rows = room->key_rows = all + pairs;
    room->value_columns = all + 2 * pairs;
    room->of_key = (float *)(all + 3 * pairs);
    room->of_value = (float *)(all + 5 * pairs);
    return 1;
}

// Returns 0, or 1 if memory ran out
int compute(Job *job, int num_threads) {
    int is_backward = job->gradient != 0, num_tasks = job->num_trees * job->groups, num_rooms = 0,
        longest = 0;
    for (const Tree *tree = job->trees; tree < job->trees + job->num_trees; tree++) {
        int length = tree_length(job, tree);
        if (length > longest) longest = length;
        if (tree->stem > job->stem) job->stem = tree->stem;
    }
    if (num_threads > num_tasks) num_threads = num_tasks;
    Room *rooms = malloc(sizeof(Room) * num_threads);
    job->of_stem = calloc(is_backward ? 2l * num_tasks * job->stem * D + 1 : 1, sizeof(float));
    while (rooms && num_rooms < num_threads && make_room(rooms + num_rooms, longest, is_backward))
        num_rooms++;
    int failed = !num_rooms || !job->of_stem;  // fewer threads will do
    if (!failed) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_rooms)
        for (int task = 0; task < num_tasks; task++)
            compute_tree(job, rooms + omp_get_thread_num(), task % job->groups, task / job->groups);
        if (is_backward && job->stem) add_stems(job);
    }
    while (num_rooms) free(rooms[--num_rooms].key_columns);
    free(rooms);
    free(job->of_stem);
    return failed;
}
