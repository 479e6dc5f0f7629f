// group_attention with a single token: its weight is one, so that nothing need be laid out in tiles. Included
// once per level; for storage in the type of accumulation.

namespace gvit::GVIT_LEVEL {

template <class T>
class SingleToken : AttentionHead<T> {
    using Head = AttentionHead<T>;
    using Head::p, Head::at, Head::select;
    const index_t whole = p.depth / kLanes<T> * kLanes<T>;

  public:
    explicit SingleToken(const AttentionParams& params) : Head(params) {}

    void forward(index_t flat_head, index_t first, index_t groups) {
        select(flat_head);
        const T *key = at(p.key, 0), *value = at(p.value, 0);
        for (index_t s = first; s < first + groups; ++s) {
            const T logit = dot(at(p.query, s), key) * static_cast<T>(p.scale);
            static_cast<T*>(p.lse)[flat_head * p.groups + s] = logit;
            add_row<false>(at(p.output, s), value, weight(logit));
        }
    }

    void backward(index_t flat_head) {
        select(flat_head);
        const T *key = at(p.key, 0), *value = at(p.value, 0);
        T *grad_key = at(p.grad_key, 0), *grad_value = at(p.grad_value, 0);
        std::memset(grad_key, 0, p.depth * sizeof(T));
        std::memset(grad_value, 0, p.depth * sizeof(T));
        for (index_t s = 0; s < p.groups; ++s) {
            const T* gradient = at(p.grad_output, s);
            const T share = weight(static_cast<const T*>(p.lse)[flat_head * p.groups + s]);
            const T change = dot(gradient, value) - dot(gradient, at(p.output, s));
            const T d_logit = share * change * static_cast<T>(p.scale);
            add_row<true>(grad_value, gradient, share);
            add_row<true>(grad_key, at(p.query, s), d_logit);
            add_row<false>(at(p.grad_query, s), key, d_logit);
        }
    }

  private:
    // e^(logit - logit): one, or NaN where the logit is not finite.
    static T weight(T logit) { return logit - logit + 1; }

    GVIT_INLINE T dot(const T* a, const T* b) const {
        Vector<T> sum{};
        for (index_t d = 0; d < whole; d += kLanes<T>) sum += load(a + d) * load(b + d);
        T total = sum_lanes<T>(sum);
        for (index_t d = whole; d < p.depth; ++d) total += a[d] * b[d];
        return total;
    }

    // to (+)= factor * row
    template <bool add>
    GVIT_INLINE void add_row(T* to, const T* row, T factor) const {
        for (index_t d = 0; d < whole; d += kLanes<T>)
            store(to + d, (add ? load(to + d) : Vector<T>{}) + load(row + d) * factor);
        for (index_t d = whole; d < p.depth; ++d) to[d] = (add ? to[d] : 0) + row[d] * factor;
    }
};

}  // namespace gvit::GVIT_LEVEL
