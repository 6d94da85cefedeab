// Gated attention between its projections: keys and values are normalised, rotated and appended first; then every
// piece takes some queries that share a KV head through (a part of) that head's keys.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/threads.h"
#include "layers/half.h"
#include "layers/aligned.h"
#include "layers/layers.h"

namespace edgeq {
namespace {

constexpr Index block_rows = 32;   // query rows of a piece: a page's keys are read once for all of them
constexpr Index few_tokens = 4;    // appended by the calling thread alone
constexpr Index append_tokens = 16;

// --- pages -----------------------------------------------------------------------------------------------------------

// Where a token's entries are in a page whose vectors take `row` numbers (kv_row): number i of the key at
// keys + i * kv_tile, of the value at values + i.
struct Place {
    Index keys, values;
};

Place place(Index heads, Index row, Index head, Index token) {
    const Index head_keys = head * kv_page * row, tile = token / kv_tile;
    return {head_keys + tile * row * kv_tile + token % kv_tile, heads * kv_page * row + head_keys + token * row};
}

// The scales of a head's keys or values.
uint8_t* scales_of(uint8_t* page, KvType type, Index heads, Index D, bool value, Index head) {
    return page + kv_entries_nbytes(type, heads, D) + ((value ? heads : 0) + head) * kv_scales_nbytes(type, D);
}

// Entries as multiples of a scale, which is returned.
float write_int8(uint8_t* page, Index at, Index step, const float* x, Index n) {
    float largest = 0.0f;
    for (Index i = 0; i < n; i++) largest = std::max(largest, std::abs(x[i]));
    const float scale = largest / 127.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    int8_t* to = reinterpret_cast<int8_t*>(page) + at;
    for (Index i = 0; i < n; i++) to[i * step] = int8_t(std::lrint(x[i] * inverse));
    return scale;
}

// Groups of four-bit entries, each as multiples of its scale; the scales of a vector are kv_page apart.
void write_int4(uint8_t* to, Index step, const float* x, Index n, uint16_t* scales) {
    constexpr Index half = kv_group / 2;
    for (Index group = 0; group < n / kv_group; group++, x += kv_group, to += half * step) {
        float farthest = 0.0f;
        for (Index i = 0; i < kv_group; i++)
            if (std::abs(x[i]) > std::abs(farthest)) farthest = x[i];
        const float wanted = std::min(std::max(farthest / -8.0f, -65504.0f), 65504.0f);
        scales[group * kv_page] = to_f16_bits(wanted);
        const float scale = from_f16(scales[group * kv_page]), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        auto code = [&](float y) { return uint8_t(std::fmin(std::fmax(std::nearbyint(y * inverse) + 8.0f, 0.0f), 15.0f)); };
        for (Index i = 0; i < half; i++) to[i * step] = uint8_t(code(x[i]) | code(x[half + i]) << 4);
    }
}

// Entries that are 16 bits wide as bits, through `bits` to work in; float entries as they are.
void write_entries(uint8_t* page, KvType type, Index at, Index step, const float* x, Index n, uint16_t* bits) {
    if (type == KvType::f32) {
        float* to = reinterpret_cast<float*>(page) + at;
        for (Index i = 0; i < n; i++) to[i * step] = x[i];
        return;
    }
    if (type == KvType::f16)
        layer_kernels().to_f16(bits, x, n);
    else
        for (Index i = 0; i < n; i++) bits[i] = to_bf16_bits(x[i]);
    uint16_t* to = reinterpret_cast<uint16_t*>(page) + at;
    for (Index i = 0; i < n; i++) to[i * step] = bits[i];
}

// Entry i of a vector whose numbers begin at `at` and are `step` apart; `scales` is its head's, at its token.
float read_entry(const uint8_t* page, KvType type, Index at, Index step, Index i, const uint8_t* scales) {
    const Index number = at + i * step;
    switch (type) {
        case KvType::f16: return from_f16(reinterpret_cast<const uint16_t*>(page)[number]);
        case KvType::bf16: return from_bf16(reinterpret_cast<const uint16_t*>(page)[number]);
        case KvType::f32: return reinterpret_cast<const float*>(page)[number];
        case KvType::int8:
            return *reinterpret_cast<const float*>(scales) * reinterpret_cast<const int8_t*>(page)[number];
        case KvType::int4: break;
    }
    constexpr Index half = kv_group / 2;
    const Index group = i / kv_group, within = i % kv_group;
    const uint8_t pair = page[at + (group * half + within % half) * step];
    const int code = within < half ? pair & 15 : pair >> 4;
    return from_f16(reinterpret_cast<const uint16_t*>(scales)[group * kv_page]) * float(code - 8);
}

// --- the pieces ------------------------------------------------------------------------------------------------------

struct Scratch {
    Floats q, value, scores, out, peak, total;
    std::vector<Index> visible;
    std::vector<const uint8_t*> keys, values, key_scales, value_scales;
    std::vector<uint16_t> bits;
};

thread_local Scratch scratch_of_thread;

// Some tokens' queries of one KV head: rows in order of token, then head, and rows of zeros up to a multiple.
struct Block {
    Index sequence, start, first, tokens, head;  // `start` the sequence's first token of all, `first` within it
};

// One head's vector of token t: normalised and rotated where the layer asks for it.
void normed(const Attention& a, const float* x, const float* gain, Index t, float* y) {
    const LayerKernels& kernels = layer_kernels();
    if (gain)
        kernels.rms_norm(y, x, gain, nullptr, a.D, a.eps);
    else
        std::memcpy(y, x, a.D * sizeof(float));
    if (a.cos) kernels.rope(y, y, a.cos + t * a.pairs, a.sin + t * a.pairs, a.pairs, a.D);
}

void append_token(const Attention& a, const KvSequence& s, Index start, Index token) {
    const Index width = kv_width(a.type, a.D), t = start + token, at = s.past + token, slot = at % kv_page;
    Scratch& scratch = scratch_of_thread;
    scratch.q.resize(std::max<Index>(scratch.q.size(), width));
    scratch.bits.resize(width);
    float* key = scratch.q.data();
    std::fill(key, key + width, 0.0f);  // padding meets the queries' zeros, and must not be NaN
    uint8_t* page = s.pages[at / kv_page];
    for (Index head = 0; head < a.Hkv; head++) {
        const Place to = place(a.Hkv, kv_row(a.type, width), head, slot);
        uint8_t* key_scales = scales_of(page, a.type, a.Hkv, a.D, false, head);
        uint8_t* value_scales = scales_of(page, a.type, a.Hkv, a.D, true, head);
        normed(a, a.k.at(t, head), a.k_norm, t, key);
        const float* value = a.v.at(t, head);
        if (a.type == KvType::int8) {
            reinterpret_cast<float*>(key_scales)[slot] = write_int8(page, to.keys, kv_tile, key, width);
            reinterpret_cast<float*>(value_scales)[slot] = write_int8(page, to.values, 1, value, a.D);
            continue;
        }
        if (a.type == KvType::int4) {
            scratch.value.assign(width, 0.0f);
            std::memcpy(scratch.value.data(), value, a.D * sizeof(float));
            layer_kernels().rotate(key, a.D);
            layer_kernels().rotate(scratch.value.data(), a.D);
            write_int4(page + to.keys, kv_tile, key, width, reinterpret_cast<uint16_t*>(key_scales) + slot);
            write_int4(page + to.values, 1, scratch.value.data(), width,
                       reinterpret_cast<uint16_t*>(value_scales) + slot);
            continue;
        }
        write_entries(page, a.type, to.keys, kv_tile, key, width, scratch.bits.data());
        write_entries(page, a.type, to.values, 1, value, a.D, scratch.bits.data());
    }
}

Index padded_rows(Index rows) { return (rows + attend_rows - 1) / attend_rows * attend_rows; }

// The block's queries through keys [begin, end); sums go to peak, total, out.
void attend_block(const Attention& a, const KvSequence& s, const Block& b, Index begin, Index end, float* peak,
                  float* total, float* out) {
    const LayerKernels& kernels = layer_kernels();
    const Index share = a.Hq / a.Hkv, width = kv_width(a.type, a.D), rows = padded_rows(b.tokens * share);
    const float scale = 1.0f / std::sqrt(float(a.D));
    Scratch& scratch = scratch_of_thread;
    scratch.q.assign(rows * width, 0.0f);
    scratch.scores.resize(rows * attend_keys);
    scratch.visible.assign(rows, end);
    for (Index row = 0; row < b.tokens * share; row++) {
        const Index t = b.start + b.first + row / share, head = b.head * share + row % share;
        float* q = &scratch.q[row * width];
        normed(a, a.q.at(t, head), a.q_norm, t, q);
        for (Index i = 0; i < a.D; i++) q[i] *= scale;
        if (a.type == KvType::int4) kernels.rotate(q, a.D);
        scratch.visible[row] = s.past + b.first + row / share + 1;
    }
    const Index pages = (end + kv_page - 1) / kv_page, size = kv_size(a.type);
    const Place at = place(a.Hkv, kv_row(a.type, width), b.head, 0);
    scratch.keys.resize(pages);
    scratch.values.resize(pages);
    scratch.key_scales.resize(pages);
    scratch.value_scales.resize(pages);
    for (Index i = 0; i < pages; i++) {
        scratch.keys[i] = s.pages[i] + at.keys * size;
        scratch.values[i] = s.pages[i] + at.values * size;
        scratch.key_scales[i] = scales_of(s.pages[i], a.type, a.Hkv, a.D, false, b.head);
        scratch.value_scales[i] = scales_of(s.pages[i], a.type, a.Hkv, a.D, true, b.head);
    }
    kernels.attend({a.type, rows, width, scratch.q.data(), scratch.visible.data(), scratch.keys.data(),
                    scratch.values.data(), scratch.key_scales.data(), scratch.value_scales.data(), begin, end, peak,
                    total, out, scratch.scores.data()});
}

// Sums over several ranges of keys -> the layer's output.
void finish_block(const Attention& a, const Block& b, Index ranges, Index range_rows, const float* peak,
                  const float* total, float* out) {
    const LayerKernels& kernels = layer_kernels();
    const Index share = a.Hq / a.Hkv, width = kv_width(a.type, a.D);
    for (Index row = 0; row < b.tokens * share; row++) {
        float most = peak[row], all = 0.0f;
        for (Index i = 1; i < ranges; i++) most = std::max(most, peak[i * range_rows + row]);
        for (Index i = 0; i < ranges; i++)
            all += total[i * range_rows + row] * std::exp(peak[i * range_rows + row] - most);
        const Index t = b.start + b.first + row / share, head = b.head * share + row % share;
        float* y = a.out + (t * a.Hq + head) * a.D;
        for (Index i = 0; i < ranges; i++) {
            const float weight = std::exp(peak[i * range_rows + row] - most) / all;
            const float* part = out + (i * range_rows + row) * width;
            for (Index j = 0; j < a.D; j++) y[j] = weight * part[j] + (i ? y[j] : 0.0f);
        }
        if (a.type == KvType::int4) kernels.rotate(y, a.D);
        if (a.gate.data) kernels.sigmoid_mul(y, y, a.gate.at(t, head), a.D);
    }
}

std::vector<Block> blocks_of(const Attention& a, const KvSequence* sequences, Index count) {
    const Index tokens = std::max<Index>(1, block_rows / (a.Hq / a.Hkv));
    std::vector<Block> blocks;
    for (Index i = 0, start = 0; i < count; start += sequences[i++].tokens)
        for (Index first = 0; first < sequences[i].tokens; first += tokens)
            for (Index head = 0; head < a.Hkv; head++)
                blocks.push_back({i, start, first, std::min(tokens, sequences[i].tokens - first), head});
    return blocks;
}

// Keys that a piece takes: all of them where there are pieces enough, else whole units so that there are.
Index keys_per_piece(const KvSequence* sequences, Index count, Index blocks) {
    constexpr Index unit = 2 * attend_keys;
    Index longest = 0;
    for (Index i = 0; i < count; i++) longest = std::max(longest, sequences[i].past + sequences[i].tokens);
    const Index wanted = (4 * thread_count() + blocks - 1) / blocks, units = (longest + unit - 1) / unit;
    return std::max<Index>(1, (units + wanted - 1) / wanted) * unit;
}

}  // namespace

void append_kv(const Attention& a, const KvSequence& s, Index start) {
    if (s.tokens <= few_tokens) {
        for (Index t = 0; t < s.tokens; t++) append_token(a, s, start, t);
        return;
    }
    parallel_for(int((s.tokens + append_tokens - 1) / append_tokens), [&](int piece) {
        const Index end = std::min(s.tokens, (piece + 1) * append_tokens);
        for (Index t = piece * append_tokens; t < end; t++) append_token(a, s, start, t);
    });
}

void attention(const Attention& a, const KvSequence* sequences, Index count) {
    for (Index i = 0, start = 0; i < count; start += sequences[i++].tokens) append_kv(a, sequences[i], start);
    const std::vector<Block> blocks = blocks_of(a, sequences, count);
    if (blocks.empty()) return;
    const Index width = kv_width(a.type, a.D);
    Index most_tokens = 0;
    for (const Block& b : blocks) most_tokens = std::max(most_tokens, b.tokens);
    const Index rows = padded_rows(most_tokens * (a.Hq / a.Hkv));
    const Index span = keys_per_piece(sequences, count, Index(blocks.size()));
    auto keys_of = [&](const Block& b) { return sequences[b.sequence].past + b.first + b.tokens; };
    Index ranges = 1;
    for (const Block& b : blocks) ranges = std::max(ranges, (keys_of(b) + span - 1) / span);

    if (ranges == 1) {
        parallel_for(int(blocks.size()), [&](int piece) {
            const Block& b = blocks[piece];
            Scratch& scratch = scratch_of_thread;
            scratch.peak.resize(rows);
            scratch.total.resize(rows);
            scratch.out.resize(rows * width);
            attend_block(a, sequences[b.sequence], b, 0, keys_of(b), scratch.peak.data(), scratch.total.data(),
                         scratch.out.data());
            finish_block(a, b, 1, rows, scratch.peak.data(), scratch.total.data(), scratch.out.data());
        });
        return;
    }
    // Peaks, totals and outputs of every range; there are few rows where keys are split, and the memory is kept.
    thread_local Floats memory;
    const Index block_size = ranges * rows * (width + 2);
    memory.resize(std::max<Index>(memory.size(), blocks.size() * block_size));
    float* sums = memory.data();  // the calling thread's, for all threads
    auto peak = [&](Index block) { return sums + block * block_size; };
    auto total = [&](Index block) { return peak(block) + ranges * rows; };
    auto out = [&](Index block) { return peak(block) + 2 * ranges * rows; };
    parallel_for(int(blocks.size() * ranges), [&](int piece) {
        const Index block = piece / ranges, range = piece % ranges;
        const Block& b = blocks[block];
        const Index end = std::min(keys_of(b), (range + 1) * span);
        if (range * span < end)
            attend_block(a, sequences[b.sequence], b, range * span, end, peak(block) + range * rows,
                         total(block) + range * rows, out(block) + range * rows * width);
    });
    for (Index block = 0; block < Index(blocks.size()); block++)
        finish_block(a, blocks[block], (keys_of(blocks[block]) + span - 1) / span, rows, peak(block), total(block),
                     out(block));
}

void read_page(const uint8_t* page, KvType type, Index heads, Index D, Index tokens, float* keys, float* values) {
    for (Index head = 0; head < heads; head++)
        for (Index t = 0; t < tokens; t++) {
            const Place from = place(heads, kv_row(type, kv_width(type, D)), head, t);
            const Index scale = t * kv_scales_nbytes(type, 1) / kv_page;  // bytes from one token's to the next's
            const uint8_t* key_scales = scales_of(const_cast<uint8_t*>(page), type, heads, D, false, head) + scale;
            const uint8_t* value_scales = scales_of(const_cast<uint8_t*>(page), type, heads, D, true, head) + scale;
            float *key = keys + (t * heads + head) * D, *value = values + (t * heads + head) * D;
            for (Index i = 0; i < D; i++) {
                key[i] = read_entry(page, type, from.keys, kv_tile, i, key_scales);
                value[i] = read_entry(page, type, from.values, 1, i, value_scales);
            }
            if (type != KvType::int4) continue;
            layer_kernels().rotate(key, D);
            layer_kernels().rotate(value, D);
        }
}

}  // namespace edgeq
