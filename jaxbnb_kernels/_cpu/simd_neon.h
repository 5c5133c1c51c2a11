// Four lanes: NEON of Arm64. Included by simd.h, which says what each function does.
#include <arm_neon.h>

namespace jaxbnb::JAXBNB_ISA {

constexpr int kLanes = 4;

struct Floats {
  float32x4_t lanes;
};
struct Ints {
  int32x4_t lanes;
};
struct Mask {  // all bits of a lane, or none
  uint32x4_t lanes;
};

JAXBNB_INLINE Floats broadcast(float a) { return {vdupq_n_f32(a)}; }
JAXBNB_INLINE Ints broadcast(int32_t a) { return {vdupq_n_s32(a)}; }
JAXBNB_INLINE Floats as_floats(Ints a) { return {vreinterpretq_f32_s32(a.lanes)}; }
JAXBNB_INLINE Ints as_ints(Floats a) { return {vreinterpretq_s32_f32(a.lanes)}; }
JAXBNB_INLINE Floats to_floats(Ints a) { return {vcvtq_f32_s32(a.lanes)}; }
JAXBNB_INLINE Ints to_ints(Floats a) { return {vcvtq_s32_f32(a.lanes)}; }
JAXBNB_INLINE Ints round_to_ints(Floats a) { return {vcvtnq_s32_f32(a.lanes)}; }

JAXBNB_INLINE Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {vfmaq_f32(c.lanes, a.lanes, b.lanes)};
}
JAXBNB_INLINE Floats sqrt(Floats a) { return {vsqrtq_f32(a.lanes)}; }

JAXBNB_INLINE Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator-(Ints a, Ints b) { return {vsubq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator*(Ints a, Ints b) { return {vmulq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator&(Ints a, Ints b) { return {vandq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator|(Ints a, Ints b) { return {vorrq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints operator^(Ints a, Ints b) { return {veorq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints min(Ints a, Ints b) { return {vminq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Ints max(Ints a, Ints b) { return {vmaxq_s32(a.lanes, b.lanes)}; }
template <int kBits>
JAXBNB_INLINE Ints shift_left(Ints a) {
  return {vshlq_n_s32(a.lanes, kBits)};
}
template <int kBits>
JAXBNB_INLINE Ints shift_right(Ints a) {  // fills with zeros
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.lanes), kBits))};
}
JAXBNB_INLINE Ints shift_right(Ints a, Ints bits) {
  const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_s32(a.lanes), vnegq_s32(bits.lanes));
  return {vreinterpretq_s32_u32(shifted)};
}

template <int16_t kFactor>
JAXBNB_INLINE Ints multiply_high(Ints a) {
  return shift_right<16>(shift_right<16>(a) * broadcast(kFactor));
}
JAXBNB_INLINE Ints with_sign(Ints a, Floats sign) {
  const Ints is_negative = {vshrq_n_s32(as_ints(sign).lanes, 31)};  // -1 or 0
  return (a ^ is_negative) - is_negative;
}

JAXBNB_INLINE Mask operator<(Floats a, Floats b) { return {vcltq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator<=(Floats a, Floats b) { return {vcleq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator>(Floats a, Floats b) { return b < a; }
JAXBNB_INLINE Mask operator>=(Floats a, Floats b) { return b <= a; }
JAXBNB_INLINE Mask operator==(Floats a, Floats b) { return {vceqq_f32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator!=(Floats a, Floats b) {
  return {vmvnq_u32(vceqq_f32(a.lanes, b.lanes))};
}
JAXBNB_INLINE Mask operator<(Ints a, Ints b) { return {vcltq_s32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator>(Ints a, Ints b) { return b < a; }
JAXBNB_INLINE Mask operator==(Ints a, Ints b) { return {vceqq_s32(a.lanes, b.lanes)}; }

JAXBNB_INLINE Mask operator&(Mask a, Mask b) { return {vandq_u32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.lanes, b.lanes)}; }
JAXBNB_INLINE Mask operator!(Mask a) { return {vmvnq_u32(a.lanes)}; }
JAXBNB_INLINE bool any(Mask a) { return vmaxvq_u32(a.lanes) != 0; }
JAXBNB_INLINE Floats select(Mask mask, Floats a, Floats b) {
  return {vbslq_f32(mask.lanes, a.lanes, b.lanes)};
}
JAXBNB_INLINE Ints select(Mask mask, Ints a, Ints b) {
  return {vbslq_s32(mask.lanes, a.lanes, b.lanes)};
}

// Arm's own minimum and maximum return NaN where either is.
JAXBNB_INLINE Floats min(Floats a, Floats b) { return select(a < b, a, b); }
JAXBNB_INLINE Floats max(Floats a, Floats b) { return select(a > b, a, b); }

// The lanes of both in turn, a0 b0 a1 b1 ..., and back.
JAXBNB_INLINE void interleave(Floats& a, Floats& b) {
  const float32x4x2_t zipped = vzipq_f32(a.lanes, b.lanes);
  a.lanes = zipped.val[0];
  b.lanes = zipped.val[1];
}
JAXBNB_INLINE void deinterleave(Floats& a, Floats& b) {
  const float32x4x2_t unzipped = vuzpq_f32(a.lanes, b.lanes);
  a.lanes = unzipped.val[0];
  b.lanes = unzipped.val[1];
}

JAXBNB_INLINE float sum(Floats a) { return vaddvq_f32(a.lanes); }
JAXBNB_INLINE int32_t sum(Ints a) { return vaddvq_s32(a.lanes); }
JAXBNB_INLINE float maximum(Floats a) { return vmaxvq_f32(a.lanes); }

JAXBNB_INLINE Floats load(const float* from) { return {vld1q_f32(from)}; }
JAXBNB_INLINE Ints load(const int32_t* from) { return {vld1q_s32(from)}; }
JAXBNB_INLINE Ints load(const uint8_t* from) {
  uint32_t word;
  memcpy(&word, from, 4);
  const uint16x8_t halves = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word)));
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(halves)))};
}
JAXBNB_INLINE Ints load(const int8_t* from) {
  uint32_t word;
  memcpy(&word, from, 4);
  return {vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word)))))};
}
JAXBNB_INLINE Ints load_halves(const uint16_t* from) {
  return {vreinterpretq_s32_u32(vmovl_u16(vld1_u16(from)))};
}
JAXBNB_INLINE Floats load(const Float16* from) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)))};
}

JAXBNB_INLINE void store(float* to, Floats a) { vst1q_f32(to, a.lanes); }
JAXBNB_INLINE void store(int32_t* to, Ints a) { vst1q_s32(to, a.lanes); }
JAXBNB_INLINE void store(int8_t* to, Ints a) {
  const int16x4_t halves = vmovn_s32(a.lanes);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
  const uint32_t word = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  memcpy(to, &word, 4);
}
JAXBNB_INLINE void store(uint8_t* to, Ints a) { store(reinterpret_cast<int8_t*>(to), a); }
JAXBNB_INLINE void store_halves(uint16_t* to, Ints a) {
  vst1_u16(to, vmovn_u32(vreinterpretq_u32_s32(a.lanes)));
}
JAXBNB_INLINE void store(Float16* to, Floats a) {
  vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.lanes)));
}

JAXBNB_INLINE Floats gather(const float* from, Ints indices) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = from[indices.lanes[i]];
  return load(lanes);
}

// The four bytes of each entry, from a table of bytes: index * 4 + (0, 1, 2, 3).
template <int kMask>
JAXBNB_INLINE uint8x16_t bytes_of_entries(Ints indices) {
  const Ints spread = (indices & broadcast(kMask)) * broadcast(0x04040404);
  return vreinterpretq_u8_s32((spread + broadcast(0x03020100)).lanes);
}
JAXBNB_INLINE Floats of_bytes(uint8x16_t bytes, Floats) { return {vreinterpretq_f32_u8(bytes)}; }
JAXBNB_INLINE Ints of_bytes(uint8x16_t bytes, Ints) { return {vreinterpretq_s32_u8(bytes)}; }

template <class T>
struct Table8 {
  uint8x16x2_t entries;

  Table8() = default;
  JAXBNB_MEMBER explicit Table8(const T* from)
      : entries(vld1q_u8_x2(reinterpret_cast<const uint8_t*>(from))) {}
  JAXBNB_MEMBER auto operator[](Ints indices) const {
    return of_bytes(vqtbl2q_u8(entries, bytes_of_entries<7>(indices)), broadcast(T{}));
  }
};

template <class T>
struct Table16 {
  uint8x16x4_t entries;

  Table16() = default;
  JAXBNB_MEMBER explicit Table16(const T* from)
      : entries(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(from))) {}
  JAXBNB_MEMBER auto operator[](Ints indices) const {
    return of_bytes(vqtbl4q_u8(entries, bytes_of_entries<15>(indices)), broadcast(T{}));
  }
  // Replaces each vector of entries.
  template <class F>
  JAXBNB_MEMBER Table16 map(F function) const {
    Table16 table = *this;
    for (uint8x16_t& part : table.entries.val) {
      part = vreinterpretq_u8_s32(function(Ints{vreinterpretq_s32_u8(part)}).lanes);
    }
    return table;
  }
};

JAXBNB_INLINE Ints increment(Ints a, Mask where) {
  return {vsubq_s32(a.lanes, vreinterpretq_s32_u32(where.lanes))};
}
JAXBNB_INLINE Ints gather(const int32_t* from, Ints indices) {
  int32_t at[kLanes], values[kLanes];
  store(at, indices);
  for (int i = 0; i < kLanes; ++i) values[i] = from[at[i]];
  return load(values);
}
JAXBNB_INLINE void store_bytes(uint8_t* to, Ints a, Ints b, Ints c, Ints d, int offset) {
  const int16x8_t offsets = vdupq_n_s16(offset);
  const int16x8_t low = vcombine_s16(vmovn_s32(a.lanes), vmovn_s32(b.lanes));
  const int16x8_t high = vcombine_s16(vmovn_s32(c.lanes), vmovn_s32(d.lanes));
  vst1q_u8(to, vcombine_u8(vqmovun_s16(vaddq_s16(low, offsets)),
                           vqmovun_s16(vaddq_s16(high, offsets))));
}
JAXBNB_INLINE Table8<float> scaled(Table8<float> table, float factor) {
  for (uint8x16_t& entries : table.entries.val) {
    entries = vreinterpretq_u8_f32(vmulq_n_f32(vreinterpretq_f32_u8(entries), factor));
  }
  return table;
}

JAXBNB_INLINE int32_t maximum(Ints a) { return vmaxvq_s32(a.lanes); }
struct ByteTable {
  uint8x16_t entries;

  JAXBNB_MEMBER explicit ByteTable(const uint8_t* from) : entries(vld1q_u8(from)) {}
};
JAXBNB_INLINE void store_nibbles(uint8_t* to, Ints a, Ints b, Ints c, Ints d,
                                 const ByteTable& table) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.lanes), vmovn_s32(b.lanes));
  const int16x8_t high = vcombine_s16(vmovn_s32(c.lanes), vmovn_s32(d.lanes));
  const uint8x16_t indices = vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
  const uint8x16_t bytes = vqtbl1q_u8(table.entries, indices);
  // The byte of lower address is the low half of a pair.
  const uint16x8_t pairs = vreinterpretq_u16_u8(bytes);
  vst1_u8(to, vmovn_u16(vorrq_u16(vshlq_n_u16(pairs, 4), vshrq_n_u16(pairs, 8))));
}

}  // namespace jaxbnb::JAXBNB_ISA
