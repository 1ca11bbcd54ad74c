// The norm and ReLU behind a pooled map, for one instruction set, see instruction_set.h.

void pooled_norm(const PooledNorm& a, int64_t first_channel, int64_t last_channel) {
  for (int64_t channel = first_channel; channel < last_channel; ++channel)
    for (int64_t image = 0; image < a.batch; ++image) {
      const int64_t start = (image * a.channels + channel) * a.size;
      const float center = a.center[channel], scale = a.scale[channel], shift = a.shift[channel];
      for (int64_t i = start; i < start + a.size; ++i) {
        const float normalized = (a.pooled[i] - center) * scale + shift;
        a.output[i] = normalized <= 0 ? 0 : normalized;
      }
    }
}

void pooled_norm_backward(const PooledNorm& a, int64_t first_channel, int64_t last_channel) {
  for (int64_t channel = first_channel; channel < last_channel; ++channel) {
    const float center = a.center[channel], scale = a.scale[channel], shift = a.shift[channel];
    double grad_sum = 0, product_sum = 0;
    for (int64_t image = 0; image < a.batch; ++image) {
      const float* grad = a.grad + (image * a.channels + channel) * a.size;
      const float* pooled = a.pooled + (image * a.channels + channel) * a.size;
      float sums[2][LANES] = {};
      int64_t i = 0;
      Vec sum = {}, products = {};
      for (; i + LANES <= a.size; i += LANES) {
        const Vec centered = load(pooled + i) - center;
        const Vec here = centered * scale + shift > Vec{} ? load(grad + i) : Vec{};
        sum += here;
        products += here * centered;
      }
      store(sums[0], sum);
      store(sums[1], products);
      for (int lane = 0; i < a.size; ++i, ++lane) {
        const float centered = pooled[i] - center;
        const float here = centered * scale + shift > 0 ? grad[i] : 0.0f;
        sums[0][lane] += here;
        sums[1][lane] += here * centered;
      }
      for (int lane = 0; lane < LANES; ++lane) {
        grad_sum += sums[0][lane];
        product_sum += sums[1][lane];
      }
    }
    a.grad_sum[channel] = grad_sum;
    a.product_sum[channel] = product_sum;
  }
}
