// The CLASSP step over many dense tensors in one pass over memory. rule.py says what it computes;
// for the powers 1 and 2 the operations here are those of its tensor operations, to the last bit.
#include <cmath>
#include <cstdint>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

// glibc has vector versions of these; they are used where this says that they exist.
#ifdef CLASSP_VECTOR_POW
#pragma omp declare simd notinbranch
extern "C" float powf(float, float) noexcept;
#pragma omp declare simd notinbranch
extern "C" double pow(double, double) noexcept;
#endif
#ifdef CLASSP_VECTOR_CBRT
#pragma omp declare simd notinbranch
extern "C" float cbrtf(float) noexcept;
#pragma omp declare simd notinbranch
extern "C" double cbrt(double) noexcept;
#endif

namespace {

inline float raise(float x, float y) { return powf(x, y); }
inline double raise(double x, double y) { return pow(x, y); }
inline float cube_root(float x) { return cbrtf(x); }
inline double cube_root(double x) { return cbrt(x); }

// x^y for y > 0. A vector pow takes the entries that are zero one by one, so they are shown as 1.
// With a selection instead of the subtraction the compiler would show them after all.
template <typename T>
inline T raise_any(T x, T y) {
  const T zero = x == 0;
  return raise(x + zero, y) - zero;
}

// The hyper-parameters in the type of the tensors.
template <typename T>
struct Rule {
  T step;     // -lr, or lr to maximize
  T cutoff;   // g² > threshold ⇔ |g| > cutoff
  T limit;    // gradients above it are skipped
  T epsilon;
  T power;
  T inverse;  // 1 / power
  bool apply_decay;
  bool may_vanish;  // whether the root can be zero or lose its digits
};

enum class Power { one, two, half, three_halves, three, any };

// x^power: pow costs many times as much as what some powers can do with.
template <Power power, typename T>
inline T powered(T x, const Rule<T>& rule) {
  return power == Power::one            ? x
         : power == Power::half         ? std::sqrt(x)
         : power == Power::three_halves ? x * std::sqrt(x)
         : power == Power::three        ? x * x * x
                                        : raise_any(x, rule.power);
}

// x^(1/power)
template <Power power, typename T>
inline T root_of(T x, const Rule<T>& rule) {
  return power == Power::one            ? x
         : power == Power::half         ? x * x
         : power == Power::three_halves ? cube_root(x) * cube_root(x)
         : power == Power::three        ? cube_root(x)
                                        : raise_any(x, rule.inverse);
}

// The loop over entries: all that does not change in it is a template argument.
// noinline: inside a parallel region the compiler would see too many aliases to vectorize.
template <typename T, Power power, bool apply_decay, bool may_vanish>
__attribute__((noinline)) void update(const Rule<T> rule, T* __restrict p, const T* __restrict g,
                                      T* __restrict a, const int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T raw = std::fabs(g[i]);
    const bool chosen = raw > rule.cutoff && raw <= rule.limit;
    const T u = chosen ? g[i] : T(0);
    const T length = chosen ? raw : T(0);
    const T history =
        power == Power::two ? std::fma(u, u, a[i]) : a[i] + powered<power>(length, rule);
    a[i] = history;
    if (!apply_decay) {
      p[i] = std::fma(u, rule.step, p[i]);
      continue;
    }
    const T base = history + rule.epsilon;
    if (power == Power::two && !may_vanish) {
      p[i] = std::fma(rule.step * u, T(1) / std::sqrt(base), p[i]);
    } else if (!may_vanish) {
      p[i] += rule.step * u / root_of<power>(base, rule);
    } else {
      const T moved = power == Power::two ? u * (T(1) / std::sqrt(base))
                                          : u / root_of<power>(base, rule);
      // Without history: no step. Where underflow took digits: within lr.
      const bool finite = std::fabs(moved) <= std::numeric_limits<T>::max();
      const T within = moved > T(1) ? T(1) : moved < T(-1) ? T(-1) : moved;
      p[i] = std::fma(finite ? within : T(0), rule.step, p[i]);
    }
  }
}

template <typename T>
using Update = void (*)(Rule<T>, T*, const T*, T*, int64_t);

template <typename T, Power power>
Update<T> chosen_update(const Rule<T>& rule) {
  if (!rule.apply_decay) return update<T, power, false, false>;
  return rule.may_vanish ? update<T, power, true, true> : update<T, power, true, false>;
}

template <typename T>
__attribute__((noinline)) bool within(const T* g, const int64_t size, const T limit) {
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < size; ++i) outside |= !(std::fabs(g[i]) <= limit);  // NaN is outside
  return !outside;
}

// Call f(tensor, begin, end) for ranges that cover all tensors, on up to `threads` threads.
template <typename F>
void over_all(int64_t tensors, const int64_t* sizes, int threads, F f) {
  const int64_t per_thread = 1 << 15;  // fewer entries are not worth another thread
  const int64_t unit = 64;             // two threads never write to the same cache line
  int64_t total = 0;
  for (int64_t k = 0; k < tensors; ++k) total += sizes[k];
  const int64_t useful = total / per_thread;
  const int team = useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    int64_t rank = 0, ranks = 1;
#ifdef _OPENMP
    rank = omp_get_thread_num();
    ranks = omp_get_num_threads();
#endif
    const int64_t units = (total + unit - 1) / unit;
    const int64_t first = units * rank / ranks * unit;
    const int64_t end = units * (rank + 1) / ranks * unit;
    int64_t start = 0;
    for (int64_t k = 0; k < tensors; ++k) {
      const int64_t from = first > start ? first - start : 0;
      const int64_t to = end - start < sizes[k] ? end - start : sizes[k];
      if (from < to) f(k, from, to);
      start += sizes[k];
    }
  }
}

template <typename T>
void step(int64_t tensors, T* const* params, const T* const* grads, T* const* accumulators,
          const int64_t* sizes, int threads, const Rule<T> rule) {
  const Update<T> chosen = rule.power == 1            ? chosen_update<T, Power::one>(rule)
                           : rule.power == 2          ? chosen_update<T, Power::two>(rule)
                           : rule.power == T(0.5)     ? chosen_update<T, Power::half>(rule)
                           : rule.power == T(1.5)     ? chosen_update<T, Power::three_halves>(rule)
                           : rule.power == 3          ? chosen_update<T, Power::three>(rule)
                                                      : chosen_update<T, Power::any>(rule);
  over_all(tensors, sizes, threads, [=](int64_t k, int64_t from, int64_t to) {
    chosen(rule, params[k] + from, grads[k] + from, accumulators[k] + from, to - from);
  });
}

template <typename T>
int64_t first_outside(int64_t tensors, const T* const* grads, const int64_t* sizes, int threads,
                      T limit) {
  int64_t found = tensors;
  over_all(tensors, sizes, threads, [&](int64_t k, int64_t from, int64_t to) {
    if (within(grads[k] + from, to - from, limit)) return;
#pragma omp critical
    if (k < found) found = k;
  });
  return found;
}

}  // namespace

#define CLASSP_EXPORT(T, suffix)                                                                   \
  extern "C" void classp_step_##suffix(                                                            \
      int64_t tensors, T* const* params, const T* const* grads, T* const* accumulators,            \
      const int64_t* sizes, int threads, double step_length, double cutoff, double limit,          \
      double epsilon, double power, int apply_decay, int may_vanish) {                             \
    step<T>(tensors, params, grads, accumulators, sizes, threads,                                  \
            {T(step_length), T(cutoff), T(limit), T(epsilon), T(power), T(1 / power),              \
             apply_decay != 0, may_vanish != 0});                                                  \
  }                                                                                                \
  extern "C" int64_t classp_first_outside_##suffix(int64_t tensors, const T* const* grads,         \
                                                   const int64_t* sizes, int threads,              \
                                                   double limit) {                                 \
    return first_outside<T>(tensors, grads, sizes, threads, T(limit));                             \
  }

CLASSP_EXPORT(float, float32)
CLASSP_EXPORT(double, float64)
