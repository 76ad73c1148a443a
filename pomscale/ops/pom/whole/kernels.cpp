// Elementwise work on the rows of a chunk in fp32; native.py has the declarations, kernels.py says what each does.
//
// Threads divide the channels and run over all rows, so no sum depends on their number. Values are loaded into local
// arrays of LANES, which the compiler keeps in vector registers, before results are stored: operands may be results.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 128;    // channels of a thread at a time
constexpr int64_t PARTIAL = 64;   // rows that are summed in fp32 before they are added in fp64
constexpr int64_t MAX_DEGREE = 8;
constexpr int64_t SERIAL = 1 << 15;  // fewer values are not worth a second thread

#define INLINE static inline __attribute__((always_inline))

INLINE float exponential(float x) {  // of x <= 0; NaN stays NaN, since comparisons with it are false
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// The normal distribution at u, and e = exp(-u^2 / 2). With t = 1 / (1 + 0.27 |u|) the tail is e times a polynomial in
// t, fitted by least squares of the relative error (at most 3e-8) over |u| <= 14.
INLINE float normal(float u, float* e) {
  static const float q[] = {0.107722849f, 0.107503925f, 0.10209899f, 0.0708854128f, 0.110635772f, -0.0733767995f, 0.173502681f, -0.128315906f, 0.0293430896f};
  const float z = u < 0.0f ? -u : u;
  *e = exponential(-0.5f * u * u);
  const float t = 1.0f / (1.0f + 0.27f * z);
  float tail = q[8];
  for (int i = 7; i >= 0; --i) tail = tail * t + q[i];
  tail *= t * *e;
  return u < 0.0f ? tail : 1.0f - tail;
}

constexpr float DENSITY = 0.398942280f;  // 1 / sqrt(2 pi)

INLINE float activation(float u, float* slope) {  // clamp(leaky_relu(u, 0.01), -0.1, 6), and its derivative
  const float leaky = u < 0.0f ? 0.01f * u : u;
  const float steepness = u > 0.0f ? 1.0f : 0.01f;
  *slope = leaky < -0.1f ? 0.0f : (leaky > 6.0f ? 0.0f : steepness);
  return leaky < -0.1f ? -0.1f : (leaky > 6.0f ? 6.0f : leaky);
}

// Runs body(first channel, number of lanes) over the channels of a block; the number is a constant but at the end.
template <class Body>
INLINE void lanes(int64_t first, int64_t last, const Body& body) {
  int64_t c = first;
  for (; c + LANES <= last; c += LANES) body(c, LANES);
  if (c < last) body(c, last - c);
}

template <class Body>
INLINE void blocks(int64_t channels, int64_t work, int threads, const Body& body) {
  const int64_t count = (channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && work > SERIAL)
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = b * BLOCK;
    body(first, first + BLOCK < channels ? first + BLOCK : channels);
  }
}

// Sums over rows, of at most 2 MAX_DEGREE vectors of a block.
struct Sums {
  float partial[2 * MAX_DEGREE][BLOCK] = {};
  double total[2 * MAX_DEGREE][BLOCK] = {};

  void flush(int64_t vectors) {
    for (int64_t j = 0; j < vectors; ++j)
      for (int64_t c = 0; c < BLOCK; ++c) {
        total[j][c] += partial[j][c];
        partial[j][c] = 0.0f;
      }
  }
  // Adds vector j, of channels first .. last - 1, to out.
  void add_to(int64_t j, float* out, int64_t first, int64_t last) const {
    for (int64_t c = first; c < last; ++c) out[c] = static_cast<float>(out[c] + total[j][c - first]);
  }
};

INLINE bool is_flushed(int64_t row, int64_t rows) { return row % PARTIAL == PARTIAL - 1 || row == rows - 1; }

// The polynomial of a coefficient form at n channels: value = sum_m c_m v^m, v = activation(u), c (degree, width).
INLINE void polynomial(const float* u, const float* coefficients, int64_t width, int64_t degree, int64_t n,
                       float* value) {
  float v[LANES], slope;
  for (int64_t l = 0; l < n; ++l) v[l] = activation(u[l], &slope);
  for (int64_t l = 0; l < n; ++l) value[l] = 0.0f;
  for (int64_t m = degree - 1; m >= 0; --m)
    for (int64_t l = 0; l < n; ++l) value[l] = (value[l] + coefficients[m * width + l]) * v[l];
}

// Its derivative: du of a gradient, and gradient v^m is added to sums[m BLOCK] unless sums is null.
INLINE void polynomial_backward(const float* u, const float* coefficients, int64_t width, int64_t degree, int64_t n,
                                const float* gradient, float* sums, float* du) {
  float v[LANES], slope[LANES], dv[LANES], power[LANES];
  for (int64_t l = 0; l < n; ++l) v[l] = activation(u[l], &slope[l]);
  for (int64_t l = 0; l < n; ++l) power[l] = gradient[l];
  for (int64_t l = 0; l < n; ++l) dv[l] = 0.0f;
  for (int64_t m = degree; m >= 1; --m)
    for (int64_t l = 0; l < n; ++l) dv[l] = dv[l] * v[l] + m * coefficients[(m - 1) * width + l];
  if (sums)
    for (int64_t m = 0; m < degree; ++m)
      for (int64_t l = 0; l < n; ++l) sums[m * BLOCK + l] += power[l] *= v[l];
  for (int64_t l = 0; l < n; ++l) du[l] = dv[l] * gradient[l] * slope[l];
}

using Table = const float*;

// Rotary positions. Axis a has pairs[a] pairs, channel c with c + pairs[a], in a block of channels of its own. Pair c
// of row i turns by the angle whose cosine is cosines[offsets[a] + turns[i axes + a] pairs[a] + c].
struct Rotary {
  const int64_t* turns;
  const float *cosines, *sines;
  const int64_t *pairs, *offsets;
  int64_t axes;
};

// Runs body(number of the pair in the block, its two channels, cosines, sines, number of lanes) over the pairs first ..
// last - 1 of all axes at a row.
template <class Body>
INLINE void pairs_of(const Rotary& rotary, int64_t row, int64_t first, int64_t last, const Body& body) {
  int64_t before = 0;
  for (int64_t a = 0; a < rotary.axes; ++a) {
    const int64_t pairs = rotary.pairs[a];
    const int64_t begin = first > before ? first : before, end = last < before + pairs ? last : before + pairs;
    const int64_t table = rotary.offsets[a] + rotary.turns[row * rotary.axes + a] * pairs - before;
    if (begin < end)
      lanes(begin, end, [&](int64_t p, int64_t n) {
        body(p - first, p + before, p + before + pairs, rotary.cosines + table + p, rotary.sines + table + p, n);
      });
    before += pairs;
  }
}

// Adds vector j of the sums of pairs first .. last - 1 to the channels of `out` that are first (half 0) or second.
INLINE void add_pairs(const Sums& sums, int64_t j, const Rotary& rotary, int64_t half, float* out, int64_t first,
                      int64_t last) {
  int64_t before = 0;
  for (int64_t a = 0; a < rotary.axes; ++a) {
    const int64_t pairs = rotary.pairs[a];
    for (int64_t p = first > before ? first : before; p < last && p < before + pairs; ++p) {
      float* to = out + p + before + half * pairs;
      *to = static_cast<float>(*to + sums.total[j][p - first]);
    }
    before += pairs;
  }
}

}  // namespace

extern "C" {

// h (rows, width) and total (width) may be null.
void product_features(const float* u, const uint8_t* takes_part, float* h, float* total, int64_t rows, int64_t width,
                      int64_t degree, int threads) {
  const int64_t channels = width / degree;
  blocks(channels, rows * width, threads, [=](int64_t first, int64_t last) {
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
      if (!takes_part || takes_part[row])
        lanes(first, last, [&](int64_t c, int64_t n) {
          float product[LANES];
          for (int64_t l = 0; l < n; ++l) product[l] = 1.0f;
          for (int64_t j = 0; j < degree; ++j) {
            const float* from = u + row * width + j * channels + c;
            float e;
            for (int64_t l = 0; l < n; ++l) product[l] *= from[l] * normal(from[l], &e);
            if (total)
              for (int64_t l = 0; l < n; ++l) sums.partial[j][c - first + l] += product[l];
            if (h) std::memcpy(h + row * width + j * channels + c, product, n * sizeof(float));
          }
        });
      if (total && is_flushed(row, rows)) sums.flush(degree);
    }
    if (total)
      for (int64_t j = 0; j < degree; ++j) sums.add_to(j, total + j * channels, first, last);
  });
}

// dh is (rows, width) with dh_stride = width, or (width) with 0.
void product_backward(const float* u, const uint8_t* takes_part, const float* dh, int64_t dh_stride, float* du,
                      int64_t rows, int64_t width, int64_t degree, int threads) {
  const int64_t channels = width / degree;
  blocks(channels, rows * width, threads, [=](int64_t first, int64_t last) {
    for (int64_t row = 0; row < rows; ++row) {
      float* out = du + row * width;
      if (takes_part && !takes_part[row]) {
        for (int64_t j = 0; j < degree; ++j)
          std::memset(out + j * channels + first, 0, (last - first) * sizeof(float));
        continue;
      }
      lanes(first, last, [&](int64_t c, int64_t n) {
        // before[j] = h_j, slope[j] = derivative of GELU at u_(j+1), a[j] its value
        float a[MAX_DEGREE][LANES], slope[MAX_DEGREE][LANES], before[MAX_DEGREE][LANES], q[LANES];
        for (int64_t j = 0; j < degree; ++j) {
          const float* from = u + row * width + j * channels + c;
          for (int64_t l = 0; l < n; ++l) {
            float e;
            const float value = from[l], below = normal(value, &e);
            a[j][l] = value * below;
            slope[j][l] = below + value * e * DENSITY;
            before[j][l] = j == 0 ? 1.0f : before[j - 1][l] * a[j - 1][l];
          }
        }
        const float* gradient = dh + row * dh_stride + c;
        for (int64_t l = 0; l < n; ++l) q[l] = gradient[(degree - 1) * channels + l];
        for (int64_t j = degree - 1; j >= 0; --j) {
          float next[LANES];
          if (j > 0)
            for (int64_t l = 0; l < n; ++l) next[l] = gradient[(j - 1) * channels + l] + q[l] * a[j][l];
          for (int64_t l = 0; l < n; ++l) out[j * channels + c + l] = q[l] * before[j][l] * slope[j][l];
          if (j > 0) std::memcpy(q, next, n * sizeof(float));
        }
      });
    }
  });
}

// coefficients (degree, width); h (rows, width) and total (width) may be null.
void coefficient_features(const float* u, const uint8_t* takes_part, const float* coefficients, float* h, float* total,
                          int64_t rows, int64_t width, int64_t degree, int threads) {
  blocks(width, rows * width, threads, [=](int64_t first, int64_t last) {
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
      if (!takes_part || takes_part[row])
        lanes(first, last, [&](int64_t c, int64_t n) {
          float value[LANES];
          polynomial(u + row * width + c, coefficients + c, width, degree, n, value);
          if (total)
            for (int64_t l = 0; l < n; ++l) sums.partial[0][c - first + l] += value[l];
          if (h) std::memcpy(h + row * width + c, value, n * sizeof(float));
        });
      if (total && is_flushed(row, rows)) sums.flush(1);
    }
    if (total) sums.add_to(0, total, first, last);
  });
}

// dcoefficients (degree, width) may be null, and is added to.
void coefficient_backward(const float* u, const uint8_t* takes_part, const float* coefficients, const float* dh,
                          int64_t dh_stride, float* du, float* dcoefficients, int64_t rows, int64_t width,
                          int64_t degree, int threads) {
  blocks(width, rows * width, threads, [=](int64_t first, int64_t last) {
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
      if (takes_part && !takes_part[row]) {
        std::memset(du + row * width + first, 0, (last - first) * sizeof(float));
      } else {
        lanes(first, last, [&](int64_t c, int64_t n) {
          float out[LANES];
          polynomial_backward(u + row * width + c, coefficients + c, width, degree, n, dh + row * dh_stride + c,
                              dcoefficients ? &sums.partial[0][c - first] : nullptr, out);
          std::memcpy(du + row * width + c, out, n * sizeof(float));
        });
      }
      if (dcoefficients && is_flushed(row, rows)) sums.flush(degree);
    }
    if (dcoefficients)
      for (int64_t m = 0; m < degree; ++m) sums.add_to(m, dcoefficients + m * width, first, last);
  });
}

// As coefficient_features, turned by the positions of the rows; threads divide the pairs of channels.
void rotary_features(const float* u, const uint8_t* takes_part, const float* coefficients, const int64_t* turns,
                     const float* cosines, const float* sines, const int64_t* pairs, const int64_t* offsets,
                     int64_t axes, float* h, float* total, int64_t rows, int64_t width, int64_t degree, int threads) {
  const Rotary rotary{turns, cosines, sines, pairs, offsets, axes};
  blocks(width / 2, rows * width, threads, [=](int64_t first, int64_t last) {
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
      if (!takes_part || takes_part[row])
        pairs_of(rotary, row, first, last, [&](int64_t p, int64_t a, int64_t b, Table c, Table s, int64_t n) {
          float x[LANES], y[LANES], turned[2][LANES];
          polynomial(u + row * width + a, coefficients + a, width, degree, n, x);
          polynomial(u + row * width + b, coefficients + b, width, degree, n, y);
          for (int64_t l = 0; l < n; ++l) turned[0][l] = x[l] * c[l] - y[l] * s[l];
          for (int64_t l = 0; l < n; ++l) turned[1][l] = y[l] * c[l] + x[l] * s[l];
          for (int64_t half = 0; half < 2; ++half) {
            if (total)
              for (int64_t l = 0; l < n; ++l) sums.partial[half][p + l] += turned[half][l];
            if (h) std::memcpy(h + row * width + (half ? b : a), turned[half], n * sizeof(float));
          }
        });
      if (total && is_flushed(row, rows)) sums.flush(2);
    }
    if (total)
      for (int64_t half = 0; half < 2; ++half) add_pairs(sums, half, rotary, half, total, first, last);
  });
}

// As coefficient_backward, of features that are turned: their gradient is turned back.
void rotary_backward(const float* u, const uint8_t* takes_part, const float* coefficients, const int64_t* turns,
                     const float* cosines, const float* sines, const int64_t* pairs, const int64_t* offsets,
                     int64_t axes, const float* dh, int64_t dh_stride, float* du, float* dcoefficients, int64_t rows,
                     int64_t width, int64_t degree, int threads) {
  const Rotary rotary{turns, cosines, sines, pairs, offsets, axes};
  blocks(width / 2, rows * width, threads, [=](int64_t first, int64_t last) {
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
      const bool takes = !takes_part || takes_part[row];
      pairs_of(rotary, row, first, last, [&](int64_t p, int64_t a, int64_t b, Table c, Table s, int64_t n) {
        float out[2][LANES] = {}, back[2][LANES];
        const float *x = dh + row * dh_stride + a, *y = dh + row * dh_stride + b;
        for (int64_t l = 0; l < n; ++l) back[0][l] = x[l] * c[l] + y[l] * s[l];
        for (int64_t l = 0; l < n; ++l) back[1][l] = y[l] * c[l] - x[l] * s[l];
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t channel = half ? b : a;
          float* of_coefficients = dcoefficients ? &sums.partial[half * degree][p] : nullptr;
          if (takes)
            polynomial_backward(u + row * width + channel, coefficients + channel, width, degree, n, back[half],
                                of_coefficients, out[half]);
          std::memcpy(du + row * width + channel, out[half], n * sizeof(float));
        }
      });
      if (dcoefficients && is_flushed(row, rows)) sums.flush(2 * degree);
    }
    if (dcoefficients)
      for (int64_t j = 0; j < 2 * degree; ++j)
        add_pairs(sums, j, rotary, j / degree, dcoefficients + (j % degree) * width, first, last);
  });
}

}  // extern "C"

namespace {

INLINE float gate_of(float x, bool is_sigmoid, float* slope) {
  if (is_sigmoid) {
    const float e = exponential(x < 0.0f ? x : -x), inverse = 1.0f / (1.0f + e);
    *slope = e * inverse * inverse;
    return x < 0.0f ? e * inverse : inverse;
  }
  const float value = x * (1.0f / 6.0f) + 0.5f;
  *slope = x > -3.0f ? (x < 3.0f ? 1.0f / 6.0f : 0.0f) : 0.0f;
  return x < -3.0f ? 0.0f : (x > 3.0f ? 1.0f : value);
}

template <bool is_sigmoid>
void select_rows(const float* gate, const float* mean, int64_t mean_stride, float* selected, int64_t rows,
                 int64_t width, int threads) {
  blocks(width, rows * width, threads, [=](int64_t first, int64_t last) {
    for (int64_t row = 0; row < rows; ++row)
      lanes(first, last, [&](int64_t c, int64_t n) {
        float slope, value[LANES];
        for (int64_t l = 0; l < n; ++l)
          value[l] = gate_of(gate[row * width + c + l], is_sigmoid, &slope) * mean[row * mean_stride + c + l];
        std::memcpy(selected + row * width + c, value, n * sizeof(float));
      });
  });
}

template <bool is_sigmoid>
void select_rows_backward(const float* gate, const float* mean, int64_t mean_stride, const float* dy, float* selected,
                          float* dgate, float* dmean, int64_t rows, int64_t width, int threads) {
  blocks(width, rows * width, threads, [=](int64_t first, int64_t last) {
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
      lanes(first, last, [&](int64_t c, int64_t n) {
        float s[LANES], slope[LANES], h[LANES], gradient[LANES];
        for (int64_t l = 0; l < n; ++l) s[l] = gate_of(gate[row * width + c + l], is_sigmoid, &slope[l]);
        for (int64_t l = 0; l < n; ++l) h[l] = mean[row * mean_stride + c + l];
        for (int64_t l = 0; l < n; ++l) gradient[l] = dy[row * width + c + l];
        for (int64_t l = 0; l < n; ++l) selected[row * width + c + l] = s[l] * h[l];
        for (int64_t l = 0; l < n; ++l) dgate[row * width + c + l] = gradient[l] * h[l] * slope[l];
        if (mean_stride)
          for (int64_t l = 0; l < n; ++l) dmean[row * width + c + l] = gradient[l] * s[l];
        else
          for (int64_t l = 0; l < n; ++l) sums.partial[0][c - first + l] += gradient[l] * s[l];
      });
      if (!mean_stride && is_flushed(row, rows)) sums.flush(1);
    }
    if (!mean_stride) sums.add_to(0, dmean, first, last);
  });
}

}  // namespace

extern "C" {

// mean is (rows, width) with mean_stride = width, or (width) with 0.
void select_means(const float* gate, const float* mean, int64_t mean_stride, float* selected, int64_t rows, int64_t width,
            int is_sigmoid, int threads) {
  auto run = is_sigmoid ? select_rows<true> : select_rows<false>;
  run(gate, mean, mean_stride, selected, rows, width, threads);
}

// dmean is (rows, width) and written, or with mean_stride = 0 (width) and added to.
void select_means_backward(const float* gate, const float* mean, int64_t mean_stride, const float* dy, float* selected,
                     float* dgate, float* dmean, int64_t rows, int64_t width, int is_sigmoid, int threads) {
  auto run = is_sigmoid ? select_rows_backward<true> : select_rows_backward<false>;
  run(gate, mean, mean_stride, dy, selected, dgate, dmean, rows, width, threads);
}

void running_means(float* h, float* carry, int64_t offset, int64_t rows, int64_t width, int threads) {
  blocks(width, rows * width, threads, [=](int64_t first, int64_t last) {
    double sums[BLOCK];
    for (int64_t c = first; c < last; ++c) sums[c - first] = carry[c];
    for (int64_t row = 0; row < rows; ++row) {
      const double share = 1.0 / static_cast<double>(offset + row + 1);
      for (int64_t c = first; c < last; ++c) {
        sums[c - first] += h[row * width + c];
        h[row * width + c] = static_cast<float>(sums[c - first] * share);
      }
    }
    for (int64_t c = first; c < last; ++c) carry[c] = static_cast<float>(sums[c - first]);
  });
}

void running_means_backward(float* dmean, float* carry, int64_t offset, int64_t rows, int64_t width, int threads) {
  blocks(width, rows * width, threads, [=](int64_t first, int64_t last) {
    double sums[BLOCK];
    for (int64_t c = first; c < last; ++c) sums[c - first] = carry[c];
    for (int64_t row = rows - 1; row >= 0; --row) {
      const double share = 1.0 / static_cast<double>(offset + row + 1);
      for (int64_t c = first; c < last; ++c) {
        sums[c - first] += dmean[row * width + c] * share;
        dmean[row * width + c] = static_cast<float>(sums[c - first]);
      }
    }
    for (int64_t c = first; c < last; ++c) carry[c] = static_cast<float>(sums[c - first]);
  });
}

}  // extern "C"
