// Sixteen lanes: AVX-512 F, BW, DQ and VL. Included by simd.h, which says what each function does.
#include <immintrin.h>

namespace jaxbnb::JAXBNB_ISA {

constexpr int kLanes = 16;

struct Floats {
  __m512 lanes;
};
struct Ints {
  __m512i lanes;
};
struct Mask {
  __mmask16 lanes;
};

JAXBNB_INLINE Floats broadcast(float a) { return {_mm512_set1_ps(a)}; }
JAXBNB_INLINE Ints broadcast(int32_t a) { return {_mm512_set1_epi32(a)}; }
JAXBNB_INLINE Floats as_floats(Ints a) { return {_mm512_castsi512_ps(a.lanes)}; }
JAXBNB_INLINE Ints as_ints(Floats a) { return {_mm512_castps_si512(a.lanes)}; }
JAXBNB_INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.lanes)}; }
JAXBNB_INLINE Ints to_ints(Floats a) { return {_mm512_cvttps_epi32(a.lanes)}; }
JAXBNB_INLINE Ints round_to_ints(Floats a) { return {_mm512_cvtps_epi32(a.lanes)}; }

JAXBNB_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
}
JAXBNB_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats sqrt(Floats a) { return {_mm512_sqrt_ps(a.lanes)}; }

JAXBNB_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints min(Ints a, Ints b) { return {_mm512_min_epi32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.lanes, b.lanes)}; }
template <int kBits>
JAXBNB_INLINE Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.lanes, kBits)};
}
template <int kBits>
JAXBNB_INLINE Ints shift_right(Ints a) {  // fills with zeros
  return {_mm512_srli_epi32(a.lanes, kBits)};
}
JAXBNB_INLINE Ints shift_right(Ints a, Ints bits) {
  return {_mm512_srlv_epi32(a.lanes, bits.lanes)};
}

template <int16_t kFactor>
JAXBNB_INLINE Ints multiply_high(Ints a) {
  return shift_right<16>({_mm512_madd_epi16(a.lanes, _mm512_set1_epi32(kFactor << 16))});
}
JAXBNB_INLINE Ints with_sign(Ints a, Floats sign) {
  const __mmask16 is_negative = _mm512_movepi32_mask(as_ints(sign).lanes);
  return {_mm512_mask_sub_epi32(a.lanes, is_negative, _mm512_setzero_si512(), a.lanes)};
}

JAXBNB_INLINE Mask operator<(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_LT_OQ)};
}
JAXBNB_INLINE Mask operator<=(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_LE_OQ)};
}
JAXBNB_INLINE Mask operator>(Floats a, Floats b) { return b < a; }
JAXBNB_INLINE Mask operator>=(Floats a, Floats b) { return b <= a; }
JAXBNB_INLINE Mask operator==(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_EQ_OQ)};
}
JAXBNB_INLINE Mask operator!=(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_NEQ_UQ)};
}
JAXBNB_INLINE Mask operator<(Ints a, Ints b) { return {_mm512_cmplt_epi32_mask(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator>(Ints a, Ints b) { return b < a; }
JAXBNB_INLINE Mask operator==(Ints a, Ints b) {
  return {_mm512_cmpeq_epi32_mask(a.lanes, b.lanes)};
}

JAXBNB_INLINE Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator|(Mask a, Mask b) { return {_kor_mask16(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator!(Mask a) { return {_knot_mask16(a.lanes)}; }
JAXBNB_INLINE bool any(Mask a) { return a.lanes != 0; }
JAXBNB_INLINE Floats select(Mask mask, Floats a, Floats b) {
  return {_mm512_mask_blend_ps(mask.lanes, b.lanes, a.lanes)};
}
JAXBNB_INLINE Ints select(Mask mask, Ints a, Ints b) {
  return {_mm512_mask_blend_epi32(mask.lanes, b.lanes, a.lanes)};
}

// The lanes of both in turn, a0 b0 a1 b1 ..., and back.
JAXBNB_INLINE void interleave(Floats& a, Floats& b) {
  const __m512i first =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 lanes = _mm512_permutex2var_ps(a.lanes, first, b.lanes);
  b.lanes = _mm512_permutex2var_ps(a.lanes, second, b.lanes);
  a.lanes = lanes;
}
JAXBNB_INLINE void deinterleave(Floats& a, Floats& b) {
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 lanes = _mm512_permutex2var_ps(a.lanes, even, b.lanes);
  b.lanes = _mm512_permutex2var_ps(a.lanes, odd, b.lanes);
  a.lanes = lanes;
}

JAXBNB_INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a.lanes); }
// Modulo 2^32, in which _mm512_reduce_add_epi32 is not defined.
JAXBNB_INLINE int32_t sum(Ints a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a.lanes),
                                        _mm512_extracti64x4_epi64(a.lanes, 1));
  __m128i part = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(part, _mm_shuffle_epi32(part, 0xb1)));
}
JAXBNB_INLINE float maximum(Floats a) { return _mm512_reduce_max_ps(a.lanes); }

JAXBNB_INLINE Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
JAXBNB_INLINE Ints load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
JAXBNB_INLINE Ints load(const uint8_t* from) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
JAXBNB_INLINE Ints load(const int8_t* from) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
JAXBNB_INLINE Ints load_halves(const uint16_t* from) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
JAXBNB_INLINE Floats load(const Float16* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

JAXBNB_INLINE void store(float* to, Floats a) { _mm512_storeu_ps(to, a.lanes); }
JAXBNB_INLINE void store(int32_t* to, Ints a) { _mm512_storeu_si512(to, a.lanes); }
JAXBNB_INLINE void store(uint8_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.lanes));
}
JAXBNB_INLINE void store(int8_t* to, Ints a) { store(reinterpret_cast<uint8_t*>(to), a); }
JAXBNB_INLINE void store_halves(uint16_t* to, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a.lanes));
}
JAXBNB_INLINE void store(Float16* to, Floats a) {
  const __m256i halves = _mm512_cvtps_ph(a.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

JAXBNB_INLINE Floats gather(const float* from, Ints indices) {
  return {_mm512_i32gather_ps(indices.lanes, from, sizeof(float))};
}

JAXBNB_INLINE Floats permute(__m512i entries, Ints indices, Floats) {
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi32(indices.lanes, entries))};
}
JAXBNB_INLINE Ints permute(__m512i entries, Ints indices, Ints) {
  return {_mm512_permutexvar_epi32(indices.lanes, entries)};
}

template <class T>
struct Table16 {
  __m512i entries;

  Table16() = default;
  JAXBNB_MEMBER explicit Table16(const T* from) : entries(_mm512_loadu_si512(from)) {}
  JAXBNB_MEMBER auto operator[](Ints indices) const {
    return permute(entries, indices, broadcast(T{}));
  }
  // Replaces each vector of entries.
  template <class F>
  JAXBNB_MEMBER Table16 map(F function) const {
    Table16 table = *this;
    table.entries = function(Ints{entries}).lanes;
    return table;
  }
};

// Its eight entries are there twice, so that bit 3 of an index does not matter.
template <class T>
struct Table8 {
  __m512i entries;

  Table8() = default;
  JAXBNB_MEMBER explicit Table8(const T* from)
      : entries(_mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))) {}
  JAXBNB_MEMBER auto operator[](Ints indices) const {
    return permute(entries, indices, broadcast(T{}));
  }
};

JAXBNB_INLINE Ints increment(Ints a, Mask where) {
  return {_mm512_mask_add_epi32(a.lanes, where.lanes, a.lanes, _mm512_set1_epi32(1))};
}
JAXBNB_INLINE Ints gather(const int32_t* from, Ints indices) {
  return {_mm512_i32gather_epi32(indices.lanes, from, 4)};
}
JAXBNB_INLINE void store_bytes(uint8_t* to, Ints a, Ints b, Ints c, Ints d, int offset) {
  const __m512i offsets = _mm512_set1_epi16(offset);
  const __m512i low = _mm512_add_epi16(_mm512_packs_epi32(a.lanes, b.lanes), offsets);
  const __m512i high = _mm512_add_epi16(_mm512_packs_epi32(c.lanes, d.lanes), offsets);
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
JAXBNB_INLINE Table8<float> scaled(Table8<float> table, float factor) {
  table.entries = as_ints(Floats{_mm512_castsi512_ps(table.entries)} * broadcast(factor)).lanes;
  return table;
}

JAXBNB_INLINE int32_t maximum(Ints a) { return _mm512_reduce_max_epi32(a.lanes); }
struct ByteTable {
  __m512i entries;

  JAXBNB_MEMBER explicit ByteTable(const uint8_t* from)
      : entries(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))) {}
};
JAXBNB_INLINE void store_nibbles(uint8_t* to, Ints a, Ints b, Ints c, Ints d,
                                 const ByteTable& table) {
  const __m512i low = _mm512_packus_epi32(a.lanes, b.lanes);
  const __m512i indices = _mm512_packus_epi16(low, _mm512_packus_epi32(c.lanes, d.lanes));
  const __m512i bytes = _mm512_shuffle_epi8(table.entries, indices);
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
  // Each lane of 128 bits holds two pairs of each vector.
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i packed = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi32(order, pairs));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}

}  // namespace jaxbnb::JAXBNB_ISA
