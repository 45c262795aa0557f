/* Convolutions of float32 batches in channels-last layout, for CPUs with AVX2 and FMA; called by convolution.py.

   All of them are loops around one product: of 6 values with 16 per step, whose 6 x 16 sums stay in registers. Threads
   are those of the program's own OpenMP, which is there since torch is: this file is linked without one. Functions that
   are called from outside return 0, -1 without memory, -2 for sizes that they do not take. */

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

typedef float eight __attribute__((vector_size(32), aligned(4)));
typedef ptrdiff_t count;

enum { SIX = 6, WIDE = 16, POINTS = 16, POSITIONS = 512, MEMORY = 131072, TILES = 24 };

#define INLINE static inline __attribute__((always_inline))

INLINE count over(count a, count b) { return (a + b - 1) / b; } /* rounded up */
INLINE count least(count a, count b) { return a < b ? a : b; }
INLINE count most(count a, count b) { return a > b ? a : b; }
INLINE eight broadcast(float a) { return (eight){a, a, a, a, a, a, a, a}; }
INLINE eight load(const float *from) { return *(const eight *)from; }
INLINE void store(float *to, eight value) { *(eight *)to = value; }

/* Raised with every change of this file, here and in convolution.py, which uses no other. */
int convolution_version(void) { return 1; }

INLINE int this_thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* sums[r] += sum over k < n of six[r * row + k * step] * wide[k * wide_step : + 16] */
INLINE void multiply(eight sums[SIX][2], const float *six, count row, count step, const float *wide, count wide_step,
                     count n)
{
    for (count k = 0; k < n; k++, six += step, wide += wide_step) {
        eight low = load(wide), high = load(wide + 8);
#pragma GCC unroll 6
        for (int r = 0; r < SIX; r++) {
            eight one = broadcast(six[r * row]);
            sums[r][0] += one * low;
            sums[r][1] += one * high;
        }
    }
}

/* SIX channels, x[0] .. x[left - 1] of each of n positions and zero where there are fewer: to[n][SIX]. */
INLINE void pack_six(const float *x, count channels, count left, float *to, count n)
{
    count k = 0;
    if (left >= 8)
        for (; k < n - 1; k++) store(to + k * SIX, load(x + k * channels)); /* two too many: the next covers them */
    for (; k < n; k++)
        for (count c = 0; c < SIX; c++) to[k * SIX + c] = c < left ? x[k * channels + c] : 0;
}

/* WIDE channels in the same way, of rows of w positions: of each row first every stride-th position from 0 on, then
   from 1 on: to[rows][stride][over(w, stride)][WIDE]. So a tap finds what it sees side by side. */
INLINE void pack_wide(const float *x, count channels, count left, float *to, count rows, count w, count stride)
{
    for (count row = 0; row < rows; row++)
        for (count phase = 0; phase < stride; phase++, to += over(w, stride) * WIDE) {
            const float *from = x + (row * w + phase) * channels;
            count n = over(w - phase, stride), step = stride * channels;
            if (left >= WIDE)
                for (count k = 0; k < n; k++) {
                    store(to + k * WIDE, load(from + k * step));
                    store(to + k * WIDE + 8, load(from + k * step + 8));
                }
            else
                for (count k = 0; k < n; k++)
                    for (count c = 0; c < WIDE; c++) to[k * WIDE + c] = c < left ? from[k * step + c] : 0;
        }
}

/* The outputs first .. last that see the input through a tap: position * stride - padding + tap lies in the input. */
typedef struct { count first, last; } span;
INLINE span seen(count tap, count stride, count padding, count size, count outputs)
{
    count end = size - 1 + padding - tap;
    return (span){over(most(padding - tap, 0), stride), end < 0 ? 0 : least(outputs, end / stride + 1)};
}

/* Gradients of a convolution's weights for several losses, whose gradients at the output are those of one loss times a
   factor per image.

   grad (n, oh, ow, o); x (n, h, w, i); factors (losses, n), or NULL for one loss with factors 1
   -> gradients (losses, o, kh, kw, i). Without padding's products, in pieces of some hundred outputs: the panels of a
   piece stay in the caches. */
int weight_gradients(const float *grad, const float *x, const float *factors, float *gradients, count losses, count n,
                     count o, count oh, count ow, count i, count h, count w, count kh, count kw, count stride_y,
                     count stride_x, count padding_y, count padding_x, int threads)
{
    count taps = kh * kw, size = o * taps * i;
    count positions = most(1, POSITIONS / stride_y), pieces = over(oh * ow, positions);
    count phase_w = over(w, stride_x), packed_w = stride_x * phase_w;
    count rows = over(oh, least(oh, pieces)), images = pieces > 1 ? 1 : least(n, positions / (oh * ow));
    count x_rows = pieces > 1 ? least(h, (rows - 1) * stride_y + kh) : h; /* whole images lie side by side */
    count grad_room = images * rows * ow * over(o, SIX) * SIX;
    count x_room = images * x_rows * packed_w * over(i, WIDE) * WIDE;
    float *packed = malloc(sizeof(float) * (grad_room + x_room)), *packed_x = packed + grad_room;
    if (!packed) return -1;
    memset(gradients, 0, sizeof(float) * losses * size);
#pragma omp parallel num_threads(threads)
    for (count first = 0; first < n; first += images)
        for (count top = 0; top < oh; top += rows) {
            count these = least(images, n - first), bottom = least(top + rows, oh);
            count x_top = pieces > 1 ? least(h, most(top * stride_y - padding_y, 0)) : 0;
            count x_bottom = pieces > 1 ? most(x_top, least(h, (bottom - 1) * stride_y - padding_y + kh)) : h;
            count outputs = these * (bottom - top) * ow, inputs = these * (x_bottom - x_top) * packed_w;
#pragma omp for
            for (count c = 0; c < o; c += SIX)
                pack_six(grad + (first * oh + top) * ow * o + c, o, o - c, packed + outputs * c, outputs);
#pragma omp for
            for (count c = 0; c < i; c += WIDE)
                pack_wide(x + (first * h + x_top) * w * i + c, i, i - c, packed_x + inputs * c,
                          these * (x_bottom - x_top), w, stride_x);
#pragma omp for collapse(2)
            for (count c = 0; c < i; c += WIDE)
                for (count tap = 0; tap < taps; tap++) {
                    count ky = tap / kw, kx = tap % kw;
                    span ys = seen(ky, stride_y, padding_y, h, oh), xs = seen(kx, stride_x, padding_x, w, ow);
                    count y = most(ys.first, top), height = least(ys.last, bottom) - y;
                    count x_row = y * stride_y - padding_y + ky - x_top;
                    count x_column = xs.first * stride_x - padding_x + kx;
                    const float *inputs_seen = packed_x + inputs * c + (x_row * packed_w + x_column % stride_x * phase_w
                                                                        + x_column / stride_x) * WIDE;
                    for (count k = 0; k < o; k += SIX) {
                        const float *outputs_seen = packed + outputs * k + ((y - top) * ow + xs.first) * SIX;
                        float *found = gradients + (k * taps + tap) * i + c;
                        count group = factors ? 1 : these;
                        eight totals[losses][SIX][2]; /* the gradients' own rows share a few sets of the cache */
                        memset(totals, 0, sizeof totals);
                        for (count from = 0; from < these; from += group) {
                            eight sums[SIX][2] = {0};
                            for (count m = from; m < from + group; m++)
                                for (count row = 0; row < height; row++)
                                    multiply(sums, outputs_seen + (m * (bottom - top) + row) * ow * SIX, 1, SIX,
                                             inputs_seen + (m * (x_bottom - x_top) + row * stride_y) * packed_w * WIDE,
                                             WIDE, xs.last - xs.first);
                            for (count loss = 0; loss < losses; loss++) {
                                eight factor = broadcast(factors ? factors[loss * n + first + from] : 1);
#pragma GCC unroll 6
                                for (int r = 0; r < SIX; r++) {
                                    totals[loss][r][0] += factor * sums[r][0];
                                    totals[loss][r][1] += factor * sums[r][1];
                                }
                            }
                        }
                        for (count loss = 0; loss < losses; loss++)
                            for (count r = 0; r < least(SIX, o - k); r++) {
                                float *to = found + loss * size + r * taps * i;
                                const float *from = (const float *)totals[loss][r];
                                for (count j = 0; j < least(WIDE, i - c); j++) to[j] += from[j];
                            }
                    }
                }
        }
    free(packed);
    return 0;
}

/* Winograd's minimal filtering (Lavin and Gray 2016) along one dimension, from the points 0, 1, -1 and infinity: four
   products give two outputs of three taps, F(2, 3), or three outputs of two, F(3, 2). */

INLINE void transform_taps(const eight *k, int taps, eight to[4])
{
    eight even = taps == 3 ? .5f * (k[0] + k[2]) : .5f * k[0], odd = .5f * k[1];
    to[0] = k[0], to[1] = even + odd, to[2] = even - odd, to[3] = k[taps - 1];
}

INLINE void transform_pixels(const eight d[4], eight to[4])
{
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
}

INLINE void transform_products(const eight m[4], int outputs, eight to[3])
{
    eight even = m[1] + m[2], odd = m[1] - m[2];
    to[0] = m[0] + even;
    if (outputs == 2) to[1] = odd - m[3];
    else to[1] = odd, to[2] = even - m[3];
}

/* What a convolution does along each dimension. An input or output of stride 2 is seen as two phases, every second
   pixel each, between which it does not move. Tap t of phase a is tap start + slope * a + step * t of the kernel. */
typedef struct { int taps, phases_in, phases_out, start, slope, step; } walk;
enum { SAME, SAME_TURNED, DOWN, UP };
static const walk WALKS[] = {{3, 1, 1, 0, 0, 1}, {3, 1, 1, 2, 0, -1}, {2, 2, 1, 0, 1, 2}, {2, 1, 2, 3, -1, -2}};

/* How a convolution runs: x (n, h, w, i) -> y (n, y_h, y_w, o). */
typedef struct {
    walk go;
    int outputs;              /* of a tile along each dimension */
    count n, i, h, w, o, y_h, y_w;
    count depth;              /* channels of all input phases */
    count across, image;      /* tiles of a row and of an image */
    count together;           /* tiles worked on at a time */
    count step_in, step_out;  /* from point to point; no power of two, whose addresses would share a set of the cache */
} plan;

/* 16 outputs' kernels at one input channel and phase: taps (go.taps^2, 16) -> to[point][..][16]. */
INLINE void transform_kernel(const float taps[9][WIDE], int n, float *to, count step)
{
    for (int v = 0; v < WIDE; v += 8) {
        eight half[3][4] = {{{0}}}, k[3] = {{0}}, point[4];
        for (int column = 0; column < n; column++) {
            for (int row = 0; row < n; row++) k[row] = load(taps[n * row + column] + v);
            transform_taps(k, n, half[column]);
        }
        for (int p = 0; p < 4; p++) {
            for (int column = 0; column < n; column++) k[column] = half[column][p];
            transform_taps(k, n, point);
            for (int q = 0; q < 4; q++) store(to + (4 * p + q) * step + v, point[q]);
        }
    }
}

/* The tiles first .. first + these of an output phase: to[point][tile][input phase][i]. */
INLINE void transform_tiles(const plan *p, const float *x, const float *zeros, count phase_out, count first,
                            count these, float *to)
{
    int in = p->go.phases_in, out = p->go.phases_out;
    for (count t = 0; t < these; t++)
        for (count phase = 0; phase < in * in; phase++) {
            count tile = first + t;
            count top = in * p->outputs * (tile % p->image / p->across) - 1 + phase_out / out + phase / in;
            count left = in * p->outputs * (tile % p->across) - 1 + phase_out % out + phase % in;
            const float *pixels[POINTS], *from = x + tile / p->image * p->h * p->w * p->i;
            for (count j = 0; j < POINTS; j++) {
                count row = top + in * (j / 4), column = left + in * (j % 4);
                count inside = row >= 0 && row < p->h && column >= 0 && column < p->w;
                pixels[j] = inside ? from + (row * p->w + column) * p->i : zeros;
            }
            for (count c = 0; c < p->i; c += 8) {
                eight half[4][4], d[4], point[4];
                float *at = to + t * p->depth + phase * p->i + c;
#pragma GCC unroll 4
                for (int column = 0; column < 4; column++) {
                    for (int row = 0; row < 4; row++) d[row] = load(pixels[4 * row + column] + c);
                    transform_pixels(d, half[column]);
                }
#pragma GCC unroll 4
                for (int row = 0; row < 4; row++) {
                    for (int column = 0; column < 4; column++) d[column] = half[column][row];
                    transform_pixels(d, point);
                    for (int q = 0; q < 4; q++) store(at + (4 * row + q) * p->step_in, point[q]);
                }
            }
        }
}

/* products[point][tile][o] -> the tiles' pixels of an output phase. */
INLINE void transform_outputs(const plan *p, const float *products, const float *bias, count phase_out, count first,
                              count these, float *y)
{
    int out = p->go.phases_out, outputs = p->outputs;
    for (count t = 0; t < these; t++) {
        count tile = first + t;
        count top = out * outputs * (tile % p->image / p->across) + phase_out / out;
        count left = out * outputs * (tile % p->across) + phase_out % out;
        for (count c = 0; c < p->o; c += 8) {
            eight half[4][3], m[4], found[3], more = bias ? load(bias + c) : broadcast(0);
            const float *from = products + t * p->o + c;
#pragma GCC unroll 4
            for (int column = 0; column < 4; column++) {
                for (int row = 0; row < 4; row++) m[row] = load(from + (4 * row + column) * p->step_out);
                transform_products(m, outputs, half[column]);
            }
            for (int row = 0; row < outputs && top + out * row < p->y_h; row++) {
                for (int column = 0; column < 4; column++) m[column] = half[column][row];
                transform_products(m, outputs, found);
                float *to = y + ((tile / p->image * p->y_h + top + out * row) * p->y_w + left) * p->o + c;
                for (int column = 0; column < outputs && left + out * column < p->y_w; column++)
                    store(to + out * column * p->o, found[column] + more);
            }
        }
    }
}

/* Convolutions with padding 1 of x (n, h, w, i) to y (n, y_h, y_w, o), by tiles of 4 x 4 pixels and F(2, 3) or F(3, 2).

   what: SAME, 3x3 with stride 1; SAME_TURNED, its gradient at the input; DOWN, 4x4 with stride 2; UP, 4x4 transposed
   with stride 2 (the same numbers in convolution.py). The tap (ky, kx) from channel a to channel b is kernel[b *
   kernel_o + a * kernel_i + (size * ky + kx) * kernel_tap], size 3 or 4. bias: (o) or NULL. i is a multiple of 8, o of
   16. */
int convolve(const float *x, const float *kernel, const float *bias, float *y, count n, count i, count h, count w,
             count o, count y_h, count y_w, count kernel_o, count kernel_i, count kernel_tap, int what, int threads)
{
    if (i % 8 || o % WIDE) return -2;
    walk go = WALKS[what];
    int outputs = 5 - go.taps, size = go.taps == 3 ? 3 : 4;
    count phases_in = go.phases_in * go.phases_in, phases_out = go.phases_out * go.phases_out;
    count depth = phases_in * i, panel = POINTS * depth * WIDE, of_phase = o * POINTS * depth;
    count across = over(over(y_w, go.phases_out), outputs), image = across * over(over(y_h, go.phases_out), outputs);
    count tiles = n * image, together = over(most(TILES, MEMORY / (POINTS * (depth + o))), SIX) * SIX;
    count step_in = together * depth + WIDE, step_out = together * o + WIDE;
    count room = POINTS * (step_in + step_out); /* of a thread: the tiles' transforms, and their products */
    plan p = {go, outputs, n, i, h, w, o, y_h, y_w, depth, across, image, together, step_in, step_out};
    float *kernels = malloc(sizeof(float) * (phases_out * of_phase + threads * room + i));
    if (!kernels) return -1;
    float *rooms = kernels + phases_out * of_phase, *zeros = rooms + threads * room;
    memset(zeros, 0, sizeof(float) * i);
#pragma omp parallel num_threads(threads)
    {
        /* kernels[output phase][b / 16][point][input phase][a][16] */
#pragma omp for collapse(2)
        for (count phase = 0; phase < phases_in * phases_out; phase++)
            for (count b = 0; b < o; b += WIDE)
                for (count a = 0; a < i; a++) {
                    int row = go.start + go.slope * (int)(phase / 2), column = go.start + go.slope * (int)(phase % 2);
                    float taps[9][WIDE];
                    for (int t = 0; t < go.taps * go.taps; t++) {
                        count tap = size * (row + go.step * (t / go.taps)) + column + go.step * (t % go.taps);
                        const float *from = kernel + b * kernel_o + a * kernel_i + tap * kernel_tap;
                        for (int c = 0; c < WIDE; c++) taps[t][c] = from[c * kernel_o];
                    }
                    float *to = kernels + (phases_out > 1 ? phase * of_phase : phase * i * WIDE);
                    transform_kernel(taps, go.taps, to + b / WIDE * panel + a * WIDE, depth * WIDE);
                }
        float *transforms = rooms + this_thread() * room; /* [point][tile][channel], as the products */
        float *products = transforms + POINTS * step_in;
#pragma omp for collapse(2)
        for (count phase_out = 0; phase_out < phases_out; phase_out++)
            for (count first = 0; first < tiles; first += together) {
                count these = least(together, tiles - first);
                const float *own = kernels + phase_out * of_phase;
                transform_tiles(&p, x, zeros, phase_out, first, these, transforms);
                for (count point = 0; point < POINTS; point++)
                    for (count b = 0; b < o; b += WIDE)
                        for (count t = 0; t < these; t += SIX) {
                            eight sums[SIX][2] = {0};
                            multiply(sums, transforms + point * step_in + t * depth, depth, 1,
                                     own + b / WIDE * panel + point * depth * WIDE, WIDE, depth);
                            float *to = products + point * step_out + t * o + b;
                            for (int r = 0; r < SIX; r++, to += o) store(to, sums[r][0]), store(to + 8, sums[r][1]);
                        }
                transform_outputs(&p, products, bias, phase_out, first, these, y);
            }
    }
    free(kernels);
    return 0;
}
