/* Inner loops on a CPU, each a single pass over memory: what the same written as operations on whole tensors needs
   three to eight passes for. `slimtune.kernels.compiled` compiles this file on the user's machine and calls it.

   Tensors are contiguous. `kind` is 0 for float32 and 1 for bfloat16; arithmetic is in float32, and what is stored is
   rounded once, to the nearest, to even where there are two. Rows are independent of each other and of the threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ROWS(n) \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)") for (int64_t row = 0; row < (n); row++)
#define SIMD _Pragma("omp simd")

static inline float wide(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7fc0);
}

/* The `i`th number of a tensor; compilers see a constant `kind`, and the loop around it as one of vectors. */
static inline float get(const void *from, int kind, int64_t i) {
    return kind == 2 ? ((const uint8_t *)from)[i] : kind ? wide(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

static inline void put(void *to, int kind, int64_t i, float x) {
    if (kind)
        ((uint16_t *)to)[i] = narrow(x);
    else
        ((float *)to)[i] = x;
}

/* `at`, a function of a row, with `kind` a constant. */
#define EACH_KIND(at, ...) \
    if (kind) \
        at(__VA_ARGS__, 1); \
    else \
        at(__VA_ARGS__, 0)

/* Memory of a thread that is kept between calls. */
static float *scratch(int64_t n) {
    static _Thread_local float *held;
    static _Thread_local int64_t size;
    if (n > size) {
        free(held);
        held = malloc(4 * n);
        if (!held) abort();
        size = n;
    }
    return held;
}

/* e^x to 2 units in the last place, of numbers up to 80 (and of larger ones e^80): 2^n times a polynomial of what is left (the coefficients are Cephes'). */
static inline float exponential(float x) {
    float inside = x > 80.0f ? 80.0f : x < -87.3f ? -87.3f : x;
    float n = rintf(inside * 1.44269504f);
    float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)(x == x ? n : 0) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.3f ? 0.0f : p * power;
}

/* 1 / x of a number from 1 to e^80, by three of Newton's steps from a guess: a division takes several times as long. */
static inline float reciprocal(float x) {
    uint32_t bits;
    float y;
    memcpy(&bits, &x, 4);
    bits = 0x7ef311c7 - bits;
    memcpy(&y, &bits, 4);
    y *= 2 - x * y;
    y *= 2 - x * y;
    return y * (2 - x * y);
}

/* A number whose order among integers is that of `x` among floats, and back: compilers find extremes of integers in
   vectors, and those of floats only if they may forget about NaN. */
static inline int32_t ordered(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

static inline float unordered(int32_t order) {
    order ^= order >> 31 & 0x7fffffff;
    float x;
    memcpy(&x, &order, 4);
    return x;
}

#define LANES 16
#define ROUND(n) (((n) + LANES - 1) / LANES * LANES)

typedef float lanes_t __attribute__((vector_size(4 * LANES), aligned(4)));

/* --- packed weights ------------------------------------------------------------------------------------------- */

/* Eight codes of `bits` bits each, the lowest in the lowest byte: halves are moved apart, and theirs, and theirs. */
static inline uint64_t eight_codes(uint64_t word, int64_t bits) {
    uint64_t four = (1ull << 4 * bits) - 1, two = (1ull << 2 * bits) - 1, one = (1ull << bits) - 1;
    word = (word & four) | (word >> 4 * bits & four) << 32;
    word = (word & (two | two << 32)) | (word >> 2 * bits & (two | two << 32)) << 16;
    return (word & one * 0x0001000100010001ull) | (word >> bits & one * 0x0001000100010001ull) << 8;
}

/* As many of a row's codes as come in whole runs of 64, to one a byte; returns how many. */
static inline int64_t unpack_runs(const uint8_t *packed, int64_t n, uint8_t *to, int64_t bits) {
    int64_t done = 0;
#ifdef __AVX512VBMI__ /* eight codes into each of eight words, then each to a byte of its own */
    uint8_t bytes[64], shifts[64];
    for (int i = 0; i < 64; i++) {
        bytes[i] = (uint8_t)(i / 8 * bits + i % 8);
        shifts[i] = (uint8_t)(i % 8 * bits);
    }
    __m512i spread = _mm512_loadu_si512(bytes), shift = _mm512_loadu_si512(shifts);
    __m512i low = _mm512_set1_epi8((char)((1 << bits) - 1));
    for (; done + 64 <= n; done += 64) {
        __m512i run = _mm512_maskz_loadu_epi8((1ull << 8 * bits) - 1, packed + done / 8 * bits);
        run = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread, run));
        _mm512_storeu_si512(to + done, _mm512_and_si512(run, low));
    }
#endif
    return done;
}

/* Codes of a row of `bytes` bytes to one a byte, of which there is room for a multiple of 32. */
static inline void unpack_known(const uint8_t *packed, int64_t bytes, int64_t n, uint8_t *to, int64_t bits) {
    if (bits == 8) {
        memcpy(to, packed, n);
        return;
    }
    int64_t done = unpack_runs(packed, n, to, bits);
    packed += done / 8 * bits;
    bytes -= done / 8 * bits;
    to += done;
    n -= done;
    if (bits == 4) {
        uint16_t *pairs = (uint16_t *)to;
        SIMD for (int64_t j = 0; j < (n + 1) / 2; j++) pairs[j] = (packed[j] | packed[j] << 4) & 0x0f0f;
    } else if (bits == 2) {
        uint32_t *fours = (uint32_t *)to;
        SIMD for (int64_t j = 0; j < (n + 3) / 4; j++) {
            uint32_t octet = packed[j];
            fours[j] = (octet | octet << 6 | octet << 12 | octet << 18) & 0x03030303;
        }
    } else {
        uint64_t *eights = (uint64_t *)to;
        int64_t j = 0, whole = bytes < 8 ? 0 : (bytes - 8) / bits + 1;
        for (; j < whole && j < (n + 7) / 8; j++) {
            uint64_t word;
            memcpy(&word, packed + j * bits, 8);
            eights[j] = eight_codes(word, bits);
        }
        for (; j < (n + 7) / 8; j++) {
            uint64_t word = 0;
            for (int64_t k = j * bits; k < bytes && k < (j + 1) * bits; k++)
                word |= (uint64_t)packed[k] << 8 * (k - j * bits);
            eights[j] = eight_codes(word, bits);
        }
    }
}

static inline void unpack_row(const uint8_t *packed, int64_t bytes, int64_t bits, int64_t n, uint8_t *to) {
    if (bits == 3)
        unpack_known(packed, bytes, n, to, 3); /* a constant, so that all shifts are */
    else
        unpack_known(packed, bytes, n, to, bits);
}

/* Groups of a row of codes that were unpacked, (code - zero) * scale. `zero` may be NULL: 2^(bits - 1); its kind may be
   2: uint8. */
static inline void affine_row(const uint8_t *unpacked, const void *scale, int scale_kind, const void *zero,
                              int zero_kind, int64_t row, int64_t n, int64_t bits, int64_t group, void *out, int64_t at,
                              int kind) {
    int64_t groups = (n + group - 1) / group;
    for (int64_t g = 0; g < groups; g++) {
        int64_t start = g * group, size = n - start < group ? n - start : group;
        float s = get(scale, scale_kind, row * groups + g);
        float z = zero ? get(zero, zero_kind, row * groups + g) : (float)(1 << (bits - 1));
        SIMD for (int64_t j = start; j < start + size; j++) put(out, kind, at + j, ((float)unpacked[j] - z) * s);
    }
}

/* levels[code], of `1 << bits` levels. */
static inline void look_up(const uint8_t *unpacked, const float *levels, int64_t n, int64_t bits, float *out) {
    int64_t j = 0;
#ifdef __AVX512F__ /* from a register */
    if (bits <= 4) {
        __m512 table = _mm512_maskz_loadu_ps((__mmask16)((1u << (1 << bits)) - 1), levels);
        for (; j + 16 <= n; j += 16) {
            __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(unpacked + j)));
            _mm512_storeu_ps(out + j, _mm512_permutexvar_ps(code, table));
        }
    }
#endif
    for (; j < n; j++) out[j] = levels[unpacked[j]];
}

/* The same of numbers that were looked up. */
static inline void codebook_row(const float *number, const float *scale, int64_t row, int64_t n, int64_t group,
                                void *out, int64_t at, int kind) {
    int64_t groups = (n + group - 1) / group;
    for (int64_t g = 0; g < groups; g++) {
        int64_t start = g * group, size = n - start < group ? n - start : group;
        float s = scale[row * groups + g];
        SIMD for (int64_t j = start; j < start + size; j++) put(out, kind, at + j, number[j] * s);
    }
}

/* A weight of codes on a grid. */
void decode_affine(const uint8_t *codes, int64_t bytes, const void *scale, int64_t scale_kind, const void *zero,
                   int64_t zero_kind, int64_t rows, int64_t n, int64_t bits, int64_t group, void *out, int64_t kind,
                   int64_t threads) {
    ROWS(rows) {
        uint8_t *unpacked = (uint8_t *)scratch(n / 4 + 8);
        unpack_row(codes + row * bytes, bytes, bits, n, unpacked);
        EACH_KIND(affine_row, unpacked, scale, (int)scale_kind, zero, (int)zero_kind, row, n, bits, group, out, row * n);
    }
}

/* A weight of codes of levels: float32 levels and scales. */
void decode_codebook(const uint8_t *codes, int64_t bytes, const float *scale, const float *levels, int64_t rows,
                     int64_t n, int64_t bits, int64_t group, void *out, int64_t kind, int64_t threads) {
    ROWS(rows) {
        float *number = scratch(ROUND(n) + n / 4 + 8);
        uint8_t *unpacked = (uint8_t *)(number + ROUND(n));
        unpack_row(codes + row * bytes, bytes, bits, n, unpacked);
        look_up(unpacked, levels, n, bits, number);
        EACH_KIND(codebook_row, number, scale, row, n, group, out, row * n);
    }
}

/* Eight numbers that follow each other of a closed walk of 256 symbols through 4,096 states: number `t` is that of the
   12 bits from symbol `t` on. */
static inline void eight_states(const uint8_t *from, const float *numbers, float *out, int bits) {
    uint64_t word;
    memcpy(&word, from, 8);
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) out[i] = numbers[word >> i * bits & 4095];
}

/* One such walk, in `lines` lines that are `apart`. */
static inline void trellis_walk(const uint8_t *codes, const float *numbers, int64_t lines, int64_t apart, float *out,
                                int bits) {
    uint8_t ring[4 * 32 + 8];
    memcpy(ring, codes, 32 * bits);
    memcpy(ring + 32 * bits, ring, 8);
    for (int64_t line = 0; line < lines; line++)
        for (int64_t eight = 0; eight < 32 / lines; eight++)
            eight_states(ring + (line * (32 / lines) + eight) * bits, numbers, out + line * apart + 8 * eight, bits);
}

#define EACH_WALK(...) \
    if (bits == 2) \
        trellis_walk(__VA_ARGS__, 2); \
    else if (bits == 3) \
        trellis_walk(__VA_ARGS__, 3); \
    else \
        trellis_walk(__VA_ARGS__, 4)

/* Walks that are 16 x 16 tiles, in rows of `across` tiles. */
void decode_trellis(const uint8_t *codes, const float *numbers, int64_t down, int64_t across, int64_t bits, float *out,
                    int64_t threads) {
    ROWS(down) {
        for (int64_t tile = 0; tile < across; tile++)
            EACH_WALK(codes + (row * across + tile) * 32 * bits, numbers, 16, across * 16,
                      out + (row * across * 16 + tile) * 16);
    }
}

typedef float point_t __attribute__((vector_size(32), aligned(4)));
typedef int32_t signs_t __attribute__((vector_size(32)));

/* A point of E8P. `tables`: what coordinates are with a shift of 1/4, those of positive sign, then less the negative
   ones; the other way round for -1/4. The last sign makes their sum even. */
static inline point_t e8p(const uint8_t *code, const float *tables, const uint8_t *odd) {
    uint32_t row = code[0], signs = code[1] & 127, other = code[1] >> 7;
    signs |= (uint32_t)((__builtin_popcount(signs) + odd[row]) & 1) << 7;
    const signs_t bit = {1, 2, 4, 8, 16, 32, 64, 128}, high = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
    signs_t negative = (bit & (int32_t)signs) != 0;
    signs_t plus = (signs_t)*(const point_t *)(tables + other * 2048 + row * 8);
    signs_t minus = (signs_t)*(const point_t *)(tables + (1 - other) * 2048 + row * 8) ^ high;
    return (point_t)((plus & ~negative) | (minus & negative));
}

/* The points of a row of codes, of `bits` bytes each; `second` is what the rest stands for, as for the first at 4 bits,
   and at 3 bits each of its 256 points. */
static inline void lattice_row(const uint8_t *codes, const float *first, const float *second, const uint8_t *odd,
                               int64_t points, float *out, int bits) {
    for (int64_t point = 0; point < points; point++, codes += bits) {
        point_t sum = e8p(codes, first, odd);
        if (bits == 3) sum += *(const point_t *)(second + codes[2] * 8);
        if (bits == 4) sum += e8p(codes + 2, second, odd);
        ((point_t *)out)[point] = sum;
    }
}

#define EACH_LATTICE(...) \
    if (bits == 2) \
        lattice_row(__VA_ARGS__, 2); \
    else if (bits == 3) \
        lattice_row(__VA_ARGS__, 3); \
    else \
        lattice_row(__VA_ARGS__, 4)

void decode_lattice(const uint8_t *codes, const float *first, const float *second, const uint8_t *odd, int64_t rows,
                    int64_t points, int64_t bits, float *out, int64_t threads) {
    ROWS(rows) { EACH_LATTICE(codes + row * points * bits, first, second, odd, points, out + row * points * 8); }
}

/* --- products of a few vectors with packed weights: a row is decoded into a cache, and multiplied there ---------- */

/* The products of `w` with `some` vectors, which follow each other, to numbers that are `apart`: each is summed in as
   many parts as keep all units busy. */
static inline void some_dots(const float *w, const float *x, int64_t n, float *y, int64_t apart, int some) {
    lanes_t sum[4] = {{0}, {0}, {0}, {0}};
    int64_t parts = 4 / some, j = 0;
    for (; j + parts * LANES <= n; j += parts * LANES)
        for (int i = 0; i < 4; i++) {
            int64_t at = j + i / some * LANES;
            sum[i] += *(const lanes_t *)(w + at) * *(const lanes_t *)(x + i % some * n + at);
        }
    for (int t = 0; t < some; t++) {
        float total = 0;
        for (int i = t; i < 4; i += some)
            for (int l = 0; l < LANES; l++) total += sum[i][l];
        for (int64_t k = j; k < n; k++) total += w[k] * x[t * n + k];
        y[t * apart] = total;
    }
}

static inline void dots(const float *w, const float *x, int64_t count, int64_t n, float *y, int64_t apart) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) some_dots(w, x + t * n, n, y + t * apart, apart, 4);
    for (; t < count; t++) some_dots(w, x + t * n, n, y + t * apart, apart, 1);
}

void multiply_affine(const float *x, int64_t count, const uint8_t *codes, int64_t bytes, const void *scale,
                     int64_t scale_kind, const void *zero, int64_t zero_kind, int64_t rows, int64_t n, int64_t bits,
                     int64_t group, float *y, int64_t threads) {
    ROWS(rows) {
        float *w = scratch(ROUND(n) + n / 4 + 8);
        uint8_t *unpacked = (uint8_t *)(w + ROUND(n));
        unpack_row(codes + row * bytes, bytes, bits, n, unpacked);
        affine_row(unpacked, scale, (int)scale_kind, zero, (int)zero_kind, row, n, bits, group, w, 0, 0);
        dots(w, x, count, n, y + row, rows);
    }
}

void multiply_codebook(const float *x, int64_t count, const uint8_t *codes, int64_t bytes, const float *scale,
                       const float *levels, int64_t rows, int64_t n, int64_t bits, int64_t group, float *y,
                       int64_t threads) {
    ROWS(rows) {
        float *w = scratch(ROUND(n) + n / 4 + 8);
        uint8_t *unpacked = (uint8_t *)(w + ROUND(n));
        unpack_row(codes + row * bytes, bytes, bits, n, unpacked);
        look_up(unpacked, levels, n, bits, w);
        codebook_row(w, scale, row, n, group, w, 0, 0);
        dots(w, x, count, n, y + row, rows);
    }
}

/* Of 16 x 16 tiles, each a walk, in rows of `across` tiles. */
void multiply_trellis(const float *x, int64_t count, const uint8_t *codes, const float *numbers, int64_t down,
                      int64_t across, int64_t bits, float *y, int64_t threads) {
    ROWS(down) {
        int64_t n = across * 16;
        float *band = scratch(16 * n);
        for (int64_t tile = 0; tile < across; tile++)
            EACH_WALK(codes + (row * across + tile) * 32 * bits, numbers, 16, n, band + tile * 16);
        for (int64_t line = 0; line < 16; line++)
            dots(band + line * n, x, count, n, y + row * 16 + line, down * 16);
    }
}

void multiply_lattice(const float *x, int64_t count, const uint8_t *codes, const float *first, const float *second,
                      const uint8_t *odd, int64_t rows, int64_t points, int64_t bits, float *y, int64_t threads) {
    ROWS(rows) {
        float *w = scratch(points * 8);
        EACH_LATTICE(codes + row * points * bits, first, second, odd, points, w);
        dots(w, x, count, points * 8, y + row, rows);
    }
}

/* --- trellis codes of numbers ----------------------------------------------------------------------------------- */

/* One step of 16 walks at once: `after[r]` is the least cost of a walk whose next symbols are `r` (all of a state but
   one), from `before`, likewise, and the cost of the state between; `from` has the symbols that were dropped, those of
   eight `r` in a number. */
static inline void walk_step(const float *before, const float *x, const float *numbers, float *after, int32_t *from,
                             int bits) {
    int64_t fan = 1 << bits, places = 4096 >> bits;
    for (int64_t eight = 0; eight < places; eight += 8) {
        int32_t *said = from + eight / 8 * LANES;
        for (int64_t r = eight; r < eight + 8; r++) {
            const float *number = numbers + r * fan, *was = before + (r * fan & (places - 1)) * LANES;
            int shift = bits * (int)(r - eight);
            SIMD for (int l = 0; l < LANES; l++) {
                float off = x[l] - number[0], least = was[l] + off * off;
                int32_t at = 0;
                _Pragma("GCC unroll 16") for (int j = 1; j < fan; j++) {
                    off = x[l] - number[j];
                    float cost = was[j * LANES + l] + off * off;
                    at = cost < least ? j : at;
                    least = cost < least ? cost : least;
                }
                after[r * LANES + l] = least;
                said[l] = (int32_t)((shift ? (uint32_t)said[l] : 0) | (uint32_t)at << shift);
            }
        }
    }
}

/* The cheapest walks through `steps` numbers, 16 side by side in `x`, and their symbols. Where `seam` is given, they
   begin with its symbols (all of a state but one, a place a lane), and have them again after the last step. */
static inline void walk(const float *x, int64_t steps, const float *numbers, const int32_t *seam, float *best,
                        int32_t *from, uint8_t *symbols, int bits) {
    int64_t places = 4096 >> bits, words = places / 8 * LANES;
    float *before = best, *after = best + places * LANES;
    for (int64_t r = 0; r < places; r++)
        for (int l = 0; l < LANES; l++) before[r * LANES + l] = seam && seam[l] != r ? 1e30f : 0;
    for (int64_t t = 0; t < steps; t++) {
        walk_step(before, x + t * LANES, numbers, after, from + t * words, bits);
        float *swap = before;
        before = after;
        after = swap;
    }
    for (int l = 0; l < LANES; l++) {
        int64_t r = seam ? seam[l] : 0;
        for (int64_t other = 0; !seam && other < places; other++)
            if (before[other * LANES + l] < before[r * LANES + l]) r = other;
        for (int64_t t = steps - 1; t >= 0; t--) {
            uint32_t word = (uint32_t)from[t * words + r / 8 * LANES + l];
            int64_t symbol = word >> bits * (r % 8) & ((1 << bits) - 1);
            symbols[t * LANES + l] = (uint8_t)symbol;
            r = (r << bits | symbol) & (places - 1);
        }
    }
}

#define EACH_WIDTH(...) \
    if (bits == 2) \
        walk(__VA_ARGS__, 2); \
    else if (bits == 3) \
        walk(__VA_ARGS__, 3); \
    else \
        walk(__VA_ARGS__, 4)

/* Closed walks near `rows` sequences of 256 numbers, a symbol a byte: first through the 64 steps around the seam, then
   through all of them, closed as those said. */
void encode_trellis(const float *x, const float *numbers, int64_t rows, int64_t bits, uint8_t *symbols,
                    int64_t threads) {
    ROWS((rows + LANES - 1) / LANES) {
        int64_t places = 4096 >> bits, first = row * LANES, here = rows - first < LANES ? rows - first : LANES;
        float *side = scratch((320 + 2 * places + 256 * places / 8 + 80) * LANES), *best = side + 320 * LANES;
        int32_t *from = (int32_t *)(best + 2 * places * LANES), seam[LANES] = {0};
        uint8_t *found = (uint8_t *)(from + 256 * places / 8 * LANES);
        for (int64_t t = 0; t < 256; t++)
            for (int64_t l = 0; l < LANES; l++) side[(t + 32) * LANES + l] = l < here ? x[(first + l) * 256 + t] : 0;
        memcpy(side, side + 256 * LANES, 32 * LANES * 4);
        EACH_WIDTH(side, 64, numbers, 0, best, from, found);
        for (int64_t u = 0; u < 12 / bits - 1; u++)
            for (int64_t l = 0; l < LANES; l++) seam[l] |= found[(32 + u) * LANES + l] << bits * u;
        EACH_WIDTH(side + 32 * LANES, 256, numbers, seam, best, from, found);
        for (int64_t l = 0; l < here; l++)
            for (int64_t t = 0; t < 256; t++) symbols[(first + l) * 256 + t] = found[t * LANES + l];
    }
}

/* --- orthogonal transforms ------------------------------------------------------------------------------------ */

/* A matrix times columns of vectors that are `apart`, in place; compilers keep a column of a constant order in registers. */
static inline void columns(const float *matrix, lanes_t *x, int64_t apart, int64_t count, int order) {
    for (lanes_t *at = x; at < x + count; at++) {
        lanes_t column[32];
        for (int j = 0; j < order; j++) column[j] = at[j * apart];
        for (int i = 0; i < order; i++) {
            lanes_t even = matrix[i * order] * column[0], odd = {0};
            for (int j = 1; j + 1 < order; j += 2) {
                odd += matrix[i * order + j] * column[j];
                even += matrix[i * order + j + 1] * column[j + 1];
            }
            if (order % 2 == 0) odd += matrix[i * order + order - 1] * column[order - 1];
            at[i * apart] = even + odd;
        }
    }
}

/* The same of any order. */
static void any_columns(const float *matrix, lanes_t *x, lanes_t *column, int64_t apart, int64_t count, int64_t order) {
    for (lanes_t *at = x; at < x + count; at++) {
        for (int64_t j = 0; j < order; j++) column[j] = at[j * apart];
        for (int64_t i = 0; i < order; i++) {
            lanes_t even = {0}, odd = {0};
            for (int64_t j = 0; j < order; j += 2) {
                even += matrix[i * order + j] * column[j];
                if (j + 1 < order) odd += matrix[i * order + j + 1] * column[j + 1];
            }
            at[i * apart] = even + odd;
        }
    }
}

/* Multiply `LANES` vectors of `n` numbers, side by side in `x`, by a Kronecker product of `count` matrices. */
static void kronecker(lanes_t *x, lanes_t *column, int64_t n, int64_t count, const int64_t *orders,
                      const float *matrices) {
    int64_t right = n;
    for (int64_t factor = 0; factor < count; factor++) {
        int64_t order = orders[factor];
        right /= order;
        for (lanes_t *at = x; at < x + n; at += order * right)
            if (order == 2)
                columns(matrices, at, right, right, 2);
            else if (order == 4)
                columns(matrices, at, right, right, 4);
            else if (order == 8)
                columns(matrices, at, right, right, 8);
            else if (order == 12)
                columns(matrices, at, right, right, 12);
            else
                any_columns(matrices, at, column, right, right, order);
        matrices += order * order;
    }
}

/* y = M x of `lanes` vectors, whose numbers are `step` apart, and which begin `apart`; of y, to which `y_step` and
   `y_apart` belong, the first `keep` numbers of each vector, times `by_number` and `by_lane` where these are given. */
void transform(const float *x, int64_t step, int64_t apart, int64_t n, int64_t lanes, int64_t count,
               const int64_t *orders, const float *matrices, void *y, int64_t y_step, int64_t y_apart, int64_t keep,
               const float *by_number, const float *by_lane, int64_t kind, int64_t threads) {
    ROWS((lanes + LANES - 1) / LANES) {
        float *block = scratch(2 * n * LANES);
        int64_t first = row * LANES, here = lanes - first < LANES ? lanes - first : LANES;
        if (here < LANES) memset(block, 0, 4 * n * LANES);
        if (apart == 1)
            for (int64_t i = 0; i < n; i++) memcpy(block + i * LANES, x + i * step + first, 4 * here);
        else
            for (int64_t l = 0; l < here; l++)
                for (int64_t i = 0; i < n; i++) block[i * LANES + l] = x[i * step + (first + l) * apart];
        kronecker((lanes_t *)block, (lanes_t *)(block + n * LANES), n, count, orders, matrices);
        for (int64_t i = 0; i < keep; i++) {
            if (by_number) {
                float scale = by_number[i];
                for (int64_t l = 0; l < here; l++) block[i * LANES + l] *= scale * by_lane[first + l];
            }
            if (y_apart == 1)
                for (int64_t l = 0; l < here; l++) put(y, (int)kind, i * y_step + first + l, block[i * LANES + l]);
        }
        if (y_apart != 1)
            for (int64_t l = 0; l < here; l++)
                for (int64_t i = 0; i < keep; i++)
                    put(y, (int)kind, i * y_step + (first + l) * y_apart, block[i * LANES + l]);
    }
}

/* --- training ------------------------------------------------------------------------------------------------- */

static inline float norm_row(const void *x, const float *gain, float epsilon, int64_t start, int64_t n, void *y,
                             int kind) {
    float sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < n; j++) {
        float from = get(x, kind, start + j);
        sum += from * from;
    }
    float scale = 1 / sqrtf(sum / n + epsilon);
    SIMD for (int64_t j = 0; j < n; j++) put(y, kind, start + j, get(x, kind, start + j) * scale * gain[j]);
    return scale;
}

/* y = x gain / rms(x), and 1 / rms(x) of each row. */
void norm(const void *x, const float *gain, float epsilon, int64_t rows, int64_t n, void *y, float *inverse,
          int64_t kind, int64_t threads) {
    ROWS(rows)
        inverse[row] = kind ? norm_row(x, gain, epsilon, row * n, n, y, 1) : norm_row(x, gain, epsilon, row * n, n, y, 0);
}

static inline void norm_backward_row(const void *x, const float *gain, float scale, const void *up, int64_t start,
                                     int64_t n, void *to_x, int kind) {
    float along = 0;
    _Pragma("omp simd reduction(+ : along)") for (int64_t j = 0; j < n; j++)
        along += get(x, kind, start + j) * get(up, kind, start + j) * gain[j];
    along *= -scale * scale / n;
    SIMD for (int64_t j = 0; j < n; j++)
        put(to_x, kind, start + j, (get(up, kind, start + j) * gain[j] + get(x, kind, start + j) * along) * scale);
}

void norm_backward(const void *x, const float *gain, const float *inverse, const void *up, int64_t rows, int64_t n,
                   void *to_x, int64_t kind, int64_t threads) {
    ROWS(rows) { EACH_KIND(norm_backward_row, x, gain, inverse[row], up, row * n, n, to_x); }
}

static inline void gated_row(const void *gate, const void *value, int64_t start, int64_t n, void *y, int kind) {
    SIMD for (int64_t j = start; j < start + n; j++) {
        float g = get(gate, kind, j);
        put(y, kind, j, g * reciprocal(1 + exponential(-g)) * get(value, kind, j));
    }
}

/* y = silu(gate) * value */
void gated(const void *gate, const void *value, int64_t rows, int64_t n, void *y, int64_t kind, int64_t threads) {
    ROWS(rows) { EACH_KIND(gated_row, gate, value, row * n, n, y); }
}

static inline void gated_backward_row(const void *gate, const void *value, const void *up, int64_t start, int64_t n,
                                      void *to_gate, void *to_value, int kind) {
    SIMD for (int64_t j = start; j < start + n; j++) {
        float g = get(gate, kind, j), d = get(up, kind, j), e = exponential(-g), sigmoid = reciprocal(1 + e);
        put(to_value, kind, j, d * g * sigmoid);
        put(to_gate, kind, j, d * get(value, kind, j) * sigmoid * (1 + g * (e * sigmoid)));
    }
}

void gated_backward(const void *gate, const void *value, const void *up, int64_t rows, int64_t n, void *to_gate,
                    void *to_value, int64_t kind, int64_t threads) {
    ROWS(rows) { EACH_KIND(gated_backward_row, gate, value, up, row * n, n, to_gate, to_value); }
}

/* Of one head; `first` and `second` are where the sines of its halves start. */
static inline void turn_head(const void *x, const void *cosine, const void *sine, float sign, int64_t start, int64_t n,
                             int64_t table, int64_t first, int64_t second, void *y, int kind) {
    int64_t half = n / 2;
    SIMD for (int64_t j = 0; j < half; j++) {
        float a = get(x, kind, start + j), b = get(x, kind, start + half + j);
        put(y, kind, start + j, a * get(cosine, kind, table + j) - sign * b * get(sine, kind, first + j));
        put(y, kind, start + half + j, b * get(cosine, kind, table + half + j) + sign * a * get(sine, kind, second + j));
    }
}

/* RoPE: (x1 c1 - x2 s1, x2 c2 + x1 s2) of each head (x1, x2), or its transpose where `back`; a row is one token's
   `heads` heads of `n` numbers, and has `n` cosines and sines of its own. */
void turn(const void *x, const void *cosine, const void *sine, int64_t back, int64_t rows, int64_t heads, int64_t n,
          void *y, int64_t kind, int64_t threads) {
    ROWS(rows) {
        int64_t table = row * n, first = table + (back ? n / 2 : 0), second = table + (back ? 0 : n / 2);
        for (int64_t head = row * heads; head < (row + 1) * heads; head++)
            EACH_KIND(turn_head, x, cosine, sine, back ? -1.0f : 1.0f, head * n, n, table, first, second, y);
    }
}

/* Keys that a query may see, of the `n` there are: where `causal`, those up to its own place. */
static inline int64_t keys_seen(int64_t row, int64_t n, int64_t queries, int64_t start, int64_t causal) {
    int64_t seen = start + row % queries + 1;
    return causal && seen < n ? seen : n;
}

/* Scores `p` become exp(scale p - level), 0 where a query (of which `queries` follow each other) may not see a key. */
void probabilities(float *p, const float *level, float scale, int64_t rows, int64_t n, int64_t queries, int64_t start,
                   int64_t causal, int64_t threads) {
    ROWS(rows) {
        float *line = p + row * n, less = level[row];
        int64_t seen = keys_seen(row, n, queries, start, causal);
        SIMD for (int64_t j = 0; j < seen; j++) line[j] = exponential(line[j] * scale - less);
        memset(line + seen, 0, 4 * (n - seen));
    }
}

/* Gradients `d` to probabilities `p` become gradients to their scores: (d - less) p. */
void slopes(float *d, const float *p, const float *less, int64_t rows, int64_t n, int64_t threads) {
    ROWS(rows) {
        float *line = d + row * n, part = less[row];
        const float *by = p + row * n;
        SIMD for (int64_t j = 0; j < n; j++) line[j] = (line[j] - part) * by[j];
    }
}

static inline void extremes(const void *x, int64_t start, int64_t n, int32_t *low, int32_t *high, int kind) {
    int32_t least = *low, most = *high;
    _Pragma("omp simd reduction(min : least) reduction(max : most)") for (int64_t j = start; j < start + n; j++) {
        int32_t order = ordered(get(x, kind, j));
        least = order < least ? order : least;
        most = order > most ? order : most;
    }
    *low = least;
    *high = most;
}

static inline float exponentials(const void *x, int64_t start, int64_t n, float most, float scale, float *to,
                                 int kind) {
    float sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < n; j++) {
        to[j] = exponential((get(x, kind, start + j) - most) * scale);
        sum += to[j];
    }
    return sum;
}

/* Scores `p` become softmax(scale p), of the keys that a query may see as above, and `level` their log-sum-exp: 0 and
   infinity where all are -infinity. */
void softmax(float *p, float *level, float scale, int64_t rows, int64_t n, int64_t queries, int64_t start,
             int64_t causal, int64_t threads) {
    ROWS(rows) {
        float *line = p + row * n;
        int64_t seen = keys_seen(row, n, queries, start, causal);
        int32_t low = INT32_MAX, high = INT32_MIN;
        extremes(line, 0, seen, &low, &high, 0);
        float most = unordered(high);
        int poor = 0; /* NaN with a sign is in the order of integers below all else */
        for (int64_t j = 0; j < seen && most == -INFINITY; j++) poor |= line[j] != line[j];
        if (most == -INFINITY && !poor) {
            memset(line, 0, 4 * n);
            level[row] = INFINITY;
            continue;
        }
        float sum = exponentials(line, 0, seen, most, scale, line, 0), over = 1 / sum;
        SIMD for (int64_t j = 0; j < seen; j++) line[j] *= over;
        memset(line + seen, 0, 4 * (n - seen));
        level[row] = most * scale + logf(sum);
    }
}

/* One query's softmax(scale q k) v: keys and values `[n, width]` from `start` on, of which it sees those with a `mask`
   that is not 0, or all. */
static inline void attend_row(const void *q, const void *k, const void *v, const uint8_t *mask, float scale,
                              int64_t row, int64_t start, int64_t n, int64_t width, void *y, int kind) {
    float *score = scratch(n + 2 * width), *query = score + n, *sum = query + width, total = 0, most = -INFINITY;
    SIMD for (int64_t i = 0; i < width; i++) {
        query[i] = get(q, kind, row * width + i) * scale;
        sum[i] = 0;
    }
    for (int64_t j = 0; j < n; j++) {
        float dot = 0;
        int64_t at = start + j * width;
        _Pragma("omp simd reduction(+ : dot)") for (int64_t i = 0; i < width; i++) dot += query[i] * get(k, kind, at + i);
        score[j] = mask && !mask[row * n + j] ? -INFINITY : dot;
        most = score[j] > most || score[j] != score[j] ? score[j] : most;
    }
    if (most != -INFINITY) total = exponentials(score, 0, n, most, 1, score, 0);
    for (int64_t j = 0; j < n && total != 0; j++) {
        float p = score[j];
        int64_t at = start + j * width;
        if (p != 0) {
            SIMD for (int64_t i = 0; i < width; i++) sum[i] += p * get(v, kind, at + i);
        }
    }
    float over = total != 0 ? 1 / total : 0;
    SIMD for (int64_t i = 0; i < width; i++) put(y, kind, row * width + i, sum[i] * over);
}

/* Attention of a few queries: `rows` of them, `several` of which follow each other and share keys and values. */
void attend(const void *q, const void *k, const void *v, const uint8_t *mask, float scale, int64_t rows,
            int64_t several, int64_t n, int64_t width, void *y, int64_t kind, int64_t threads) {
    ROWS(rows) { EACH_KIND(attend_row, q, k, v, mask, scale, row, row / several * n * width, n, width, y); }
}

/* -log softmax(logits)[label] of each row; the logits become its gradient where `slope`. */
void cross_entropy(void *logits, const int64_t *label, int64_t rows, int64_t n, float *loss, int64_t slope, int64_t kind,
                   int64_t threads) {
    ROWS(rows) {
        float *line = scratch(n);
        int64_t start = row * n;
        int32_t low = INT32_MAX, high = INT32_MIN;
        EACH_KIND(extremes, logits, start, n, &low, &high);
        float most = unordered(high);
        float sum = kind ? exponentials(logits, start, n, most, 1, line, 1)
                         : exponentials(logits, start, n, most, 1, line, 0);
        loss[row] = logf(sum) + most - get(logits, (int)kind, start + label[row]);
        if (!slope) continue;
        float over = 1 / sum, there = line[label[row]] * over - 1;
        if (kind) {
            SIMD for (int64_t j = 0; j < n; j++) put(logits, 1, start + j, line[j] * over);
        } else {
            SIMD for (int64_t j = 0; j < n; j++) put(logits, 0, start + j, line[j] * over);
        }
        put(logits, (int)kind, start + label[row], there);
    }
}

/* --- products of integers ------------------------------------------------------------------------------------- */

/* The least value of each row or 0, and the greatest or 0. */
void ends(const void *x, int64_t rows, int64_t n, float *low, float *high, int64_t kind, int64_t threads) {
    ROWS(rows) {
        int32_t least = 0, most = 0;
        EACH_KIND(extremes, x, row * n, n, &least, &most);
        low[row] = unordered(least);
        high[row] = unordered(most);
    }
}

static inline void round_row(const void *x, float scale, float zero, int64_t start, int64_t n, float middle,
                             uint8_t *codes, int kind) {
    SIMD for (int64_t j = start; j < start + n; j++) {
        float code = rintf(get(x, kind, j) / scale) + zero;
        code = code < -middle ? -middle : code > middle - 1 ? middle - 1 : code;
        codes[j] = (uint8_t)((int32_t)code + 128);
    }
}

/* Codes round(x / scale) + zero, clamped to [0, 2 middle), less `middle` and around 128. `zero` may be NULL: middle. */
void round_rows(const void *x, const float *scale, const float *zero, int64_t rows, int64_t n, float middle,
                uint8_t *codes, int64_t kind, int64_t threads) {
    ROWS(rows) { EACH_KIND(round_row, x, scale[row], zero ? zero[row] - middle : 0, row * n, n, middle, codes); }
}

static inline void rescale_row(const float *product, float scale, float zero, const float *sums, int64_t start, int64_t n,
                               void *y, int kind) {
    if (sums) {
        SIMD for (int64_t j = 0; j < n; j++) put(y, kind, start + j, (product[start + j] - zero * sums[j]) * scale);
    } else {
        SIMD for (int64_t j = 0; j < n; j++) put(y, kind, start + j, product[start + j] * scale);
    }
}

/* (product - zero sums) * scale of each row, as `kind`. `zero` may be NULL: 0. */
void rescale(const float *product, const float *scale, const float *zero, const float *sums, int64_t rows, int64_t n,
             void *y, int64_t kind, int64_t threads) {
    ROWS(rows) {
        EACH_KIND(rescale_row, product, scale[row], zero ? zero[row] : 0, zero ? sums : NULL, row * n, n, y);
    }
}
