// Eight lanes: AVX2, FMA and F16C. Included by simd.h, which says what each function does.
#include <immintrin.h>

namespace jaxbnb::JAXBNB_ISA {

constexpr int kLanes = 8;

struct Floats {
  __m256 lanes;
};
struct Ints {
  __m256i lanes;
};
struct Mask {  // all bits of a lane, or none
  __m256 lanes;
};

JAXBNB_INLINE Floats broadcast(float a) { return {_mm256_set1_ps(a)}; }
JAXBNB_INLINE Ints broadcast(int32_t a) { return {_mm256_set1_epi32(a)}; }
JAXBNB_INLINE Floats as_floats(Ints a) { return {_mm256_castsi256_ps(a.lanes)}; }
JAXBNB_INLINE Ints as_ints(Floats a) { return {_mm256_castps_si256(a.lanes)}; }
JAXBNB_INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lanes)}; }
JAXBNB_INLINE Ints to_ints(Floats a) { return {_mm256_cvttps_epi32(a.lanes)}; }
JAXBNB_INLINE Ints round_to_ints(Floats a) { return {_mm256_cvtps_epi32(a.lanes)}; }

JAXBNB_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)};
}
JAXBNB_INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.lanes)}; }

JAXBNB_INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints min(Ints a, Ints b) { return {_mm256_min_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.lanes, b.lanes)}; }
template <int kBits>
JAXBNB_INLINE Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.lanes, kBits)};
}
template <int kBits>
JAXBNB_INLINE Ints shift_right(Ints a) {  // fills with zeros
  return {_mm256_srli_epi32(a.lanes, kBits)};
}
JAXBNB_INLINE Ints shift_right(Ints a, Ints bits) {
  return {_mm256_srlv_epi32(a.lanes, bits.lanes)};
}

template <int16_t kFactor>
JAXBNB_INLINE Ints multiply_high(Ints a) {
  return shift_right<16>({_mm256_madd_epi16(a.lanes, _mm256_set1_epi32(kFactor << 16))});
}
JAXBNB_INLINE Ints with_sign(Ints a, Floats sign) {
  return {_mm256_sign_epi32(a.lanes, as_ints(sign).lanes)};
}

JAXBNB_INLINE Mask operator<(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_LT_OQ)};
}
JAXBNB_INLINE Mask operator<=(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_LE_OQ)};
}
JAXBNB_INLINE Mask operator>(Floats a, Floats b) { return b < a; }
JAXBNB_INLINE Mask operator>=(Floats a, Floats b) { return b <= a; }
JAXBNB_INLINE Mask operator==(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_EQ_OQ)};
}
JAXBNB_INLINE Mask operator!=(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_NEQ_UQ)};
}
JAXBNB_INLINE Mask operator>(Ints a, Ints b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.lanes, b.lanes))};
}
JAXBNB_INLINE Mask operator<(Ints a, Ints b) { return b > a; }
JAXBNB_INLINE Mask operator==(Ints a, Ints b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.lanes, b.lanes))};
}

JAXBNB_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator!(Mask a) {
  return {_mm256_xor_ps(a.lanes, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
JAXBNB_INLINE bool any(Mask a) { return _mm256_movemask_ps(a.lanes) != 0; }
JAXBNB_INLINE Floats select(Mask mask, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.lanes, a.lanes, mask.lanes)};
}
JAXBNB_INLINE Ints select(Mask mask, Ints a, Ints b) {
  return as_ints(select(mask, as_floats(a), as_floats(b)));
}

// The lanes of both in turn, a0 b0 a1 b1 ..., and back.
JAXBNB_INLINE void interleave(Floats& a, Floats& b) {
  const __m256 low = _mm256_unpacklo_ps(a.lanes, b.lanes);
  const __m256 high = _mm256_unpackhi_ps(a.lanes, b.lanes);
  a.lanes = _mm256_permute2f128_ps(low, high, 0x20);
  b.lanes = _mm256_permute2f128_ps(low, high, 0x31);
}
JAXBNB_INLINE void deinterleave(Floats& a, Floats& b) {
  const __m256 low = _mm256_permute2f128_ps(a.lanes, b.lanes, 0x20);
  const __m256 high = _mm256_permute2f128_ps(a.lanes, b.lanes, 0x31);
  a.lanes = _mm256_shuffle_ps(low, high, 0x88);
  b.lanes = _mm256_shuffle_ps(low, high, 0xdd);
}

JAXBNB_INLINE float sum(Floats a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.lanes), _mm256_extractf128_ps(a.lanes, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
JAXBNB_INLINE int32_t sum(Ints a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a.lanes),
                               _mm256_extracti128_si256(a.lanes, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
JAXBNB_INLINE float maximum(Floats a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.lanes), _mm256_extractf128_ps(a.lanes, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

JAXBNB_INLINE Floats load(const float* from) { return {_mm256_loadu_ps(from)}; }
JAXBNB_INLINE Ints load(const int32_t* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
JAXBNB_INLINE Ints load(const uint8_t* from) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))};
}
JAXBNB_INLINE Ints load(const int8_t* from) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))};
}
JAXBNB_INLINE Ints load_halves(const uint16_t* from) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
JAXBNB_INLINE Floats load(const Float16* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}

// The low 16 bits of each lane, packed.
JAXBNB_INLINE __m128i low_halves(Ints a) {
  const __m256i low = _mm256_and_si256(a.lanes, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_castsi256_si128(packed);
}

JAXBNB_INLINE void store(float* to, Floats a) { _mm256_storeu_ps(to, a.lanes); }
JAXBNB_INLINE void store(int32_t* to, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.lanes);
}
JAXBNB_INLINE void store(uint8_t* to, Ints a) {
  const __m128i bytes = low_halves(a & broadcast(0xff));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(bytes, bytes));
}
JAXBNB_INLINE void store(int8_t* to, Ints a) { store(reinterpret_cast<uint8_t*>(to), a); }
JAXBNB_INLINE void store_halves(uint16_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_halves(a));
}
JAXBNB_INLINE void store(Float16* to, Floats a) {
  const __m128i halves = _mm256_cvtps_ph(a.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}

JAXBNB_INLINE Floats gather(const float* from, Ints indices) {
  return {_mm256_i32gather_ps(from, indices.lanes, sizeof(float))};
}

JAXBNB_INLINE __m256i load_entries(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
JAXBNB_INLINE Ints permute(__m256i entries, Ints indices, Ints) {
  return {_mm256_permutevar8x32_epi32(entries, indices.lanes)};
}
JAXBNB_INLINE Floats permute(__m256i entries, Ints indices, Floats) {
  return as_floats(permute(entries, indices, Ints{}));
}

template <class T>
struct Table8 {
  __m256i entries;

  Table8() = default;
  JAXBNB_MEMBER explicit Table8(const T* from) : entries(load_entries(from)) {}
  JAXBNB_MEMBER auto operator[](Ints indices) const {
    return permute(entries, indices, broadcast(T{}));
  }
};

// Bit 3 of an index, moved to the sign, chooses between two tables.
template <class T>
struct Table16 {
  Table8<T> low, high;

  Table16() = default;
  JAXBNB_MEMBER explicit Table16(const T* from) : low(from), high(from + 8) {}
  JAXBNB_MEMBER auto operator[](Ints indices) const {
    const Mask is_high = {as_floats(shift_left<28>(indices)).lanes};
    return select(is_high, high[indices], low[indices]);
  }
  // Replaces each vector of entries.
  template <class F>
  JAXBNB_MEMBER Table16 map(F function) const {
    Table16 table = *this;
    table.low.entries = function(Ints{low.entries}).lanes;
    table.high.entries = function(Ints{high.entries}).lanes;
    return table;
  }
};

JAXBNB_INLINE Ints increment(Ints a, Mask where) { return a - as_ints(Floats{where.lanes}); }
JAXBNB_INLINE Ints gather(const int32_t* from, Ints indices) {
  return {_mm256_i32gather_epi32(from, indices.lanes, 4)};
}
JAXBNB_INLINE void store_bytes(uint8_t* to, Ints a, Ints b, Ints c, Ints d, int offset) {
  const __m256i offsets = _mm256_set1_epi16(offset);
  const __m256i low = _mm256_add_epi16(_mm256_packs_epi32(a.lanes, b.lanes), offsets);
  const __m256i high = _mm256_add_epi16(_mm256_packs_epi32(c.lanes, d.lanes), offsets);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
}
JAXBNB_INLINE Table8<float> scaled(Table8<float> table, float factor) {
  table.entries = as_ints(as_floats(Ints{table.entries}) * broadcast(factor)).lanes;
  return table;
}

JAXBNB_INLINE int32_t maximum(Ints a) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a.lanes),
                               _mm256_extracti128_si256(a.lanes, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
struct ByteTable {
  __m256i entries;

  JAXBNB_MEMBER explicit ByteTable(const uint8_t* from)
      : entries(_mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))) {}
};
JAXBNB_INLINE void store_nibbles(uint8_t* to, Ints a, Ints b, Ints c, Ints d,
                                 const ByteTable& table) {
  const __m256i low = _mm256_packus_epi32(a.lanes, b.lanes);
  const __m256i indices = _mm256_packus_epi16(low, _mm256_packus_epi32(c.lanes, d.lanes));
  const __m256i bytes = _mm256_shuffle_epi8(table.entries, indices);
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
  // Each lane of 128 bits holds two pairs of each vector.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i ordered = _mm256_permutevar8x32_epi32(pairs, order);
  const __m256i packed = _mm256_packus_epi16(ordered, ordered);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

}  // namespace jaxbnb::JAXBNB_ISA
