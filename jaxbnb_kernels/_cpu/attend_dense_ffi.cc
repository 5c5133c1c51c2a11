// The handlers of `attend_dense`.
#include "attend_dense.h"

#include <string.h>

#include "handlers.h"

namespace jaxbnb {
namespace {

Attention attention_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                       const ffi::Buffer<ffi::PRED>& mask, float scale) {
  Attention attention{};
  attention.q = q.untyped_data();
  attention.k = k.untyped_data();
  attention.v = v.untyped_data();
  attention.mask = mask.typed_data();
  attention.dtype = dtype_of(q.element_type());
  attention.scale = scale;
  attention.batch = q.dimensions()[0];
  attention.queries = q.dimensions()[1];
  attention.heads = q.dimensions()[2];
  attention.dim = q.dimensions()[3];
  attention.keys = k.dimensions()[1];
  attention.kv_heads = k.dimensions()[2];
  attention.masks = mask.dimensions()[0];
  return attention;
}

ffi::Error attend_dense(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::Buffer<ffi::PRED> mask, ffi::Result<ffi::AnyBuffer> out,
                        float scale) {
  const Attention attention = attention_of(q, k, v, mask, scale);
  if (k.element_count() == 0) memset(out->untyped_data(), 0, out->size_bytes());
  if (k.element_count() == 0 || q.element_count() == 0) return ffi::Error::Success();
  JAXBNB_CHOSEN_BF16(attend)(attention, out->untyped_data(), ThreadPool(pool));
  return ffi::Error::Success();
}

ffi::Error attend_dense_gradient(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                                 ffi::AnyBuffer v, ffi::Buffer<ffi::PRED> mask,
                                 ffi::AnyBuffer d_out, ffi::Result<ffi::AnyBuffer> d_q,
                                 ffi::Result<ffi::AnyBuffer> d_k, ffi::Result<ffi::AnyBuffer> d_v,
                                 float scale) {
  const Attention attention = attention_of(q, k, v, mask, scale);
  if (k.element_count() == 0 || q.element_count() == 0) {
    for (auto* array : {&d_q, &d_k, &d_v}) {
      memset((*array)->untyped_data(), 0, (*array)->size_bytes());
    }
    return ffi::Error::Success();
  }
  JAXBNB_CHOSEN_BF16(attend_gradient)
  (attention, d_out.untyped_data(), d_q->untyped_data(), d_k->untyped_data(), d_v->untyped_data(),
   ThreadPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxbnb

JAXBNB_HANDLER(jaxbnb_cpu_attend_dense, jaxbnb::attend_dense,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::PRED>>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<float>("scale"));

JAXBNB_HANDLER(jaxbnb_cpu_attend_dense_gradient, jaxbnb::attend_dense_gradient,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::PRED>>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<float>("scale"));
