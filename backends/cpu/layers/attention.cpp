// Gated attention between its projections: keys and values are normalised, rotated and appended first; then every
// piece takes some queries that share a KV head through (a part of) that head's keys.
//
// A token's result depends on its keys alone: they are taken range by range, which begin at the same places for
// everybody, and the sums of the ranges are merged in their order, whoever computed them and whenever.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/scratch.h"
#include "kernels/threads.h"
#include "layers/half.h"
#include "layers/layers.h"

namespace edgeq {
namespace {

constexpr Index block_rows = 32;   // query rows of a piece: a page's keys are read once for all of them
constexpr Index append_alone = 4;  // tokens that the calling thread appends by itself
constexpr Index append_tokens = 16;
constexpr Index range_keys = 256;  // whose sums are merged with the others': the unit of work where keys are shared out
constexpr size_t kept_nbytes = 1 << 20;  // of sums that wait to be merged, about

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
        auto code = [&](float y) {
            return uint8_t(std::fmin(std::fmax(std::nearbyint(y * inverse) + 8.0f, 0.0f), 15.0f));
        };
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
    Floats q, value, scores, sums, all;
    std::vector<Index> visible;
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

// Sums of `rows` rows in a piece of memory of sums_size floats.
Index sums_size(Index rows, Index width) { return rows * (width + 2); }

Sums sums_at(float* memory, Index rows) { return {memory, memory + rows, memory + 2 * rows}; }

// Sums over no keys.
Sums no_sums(float* memory, Index rows, Index width) {
    std::fill(memory, memory + sums_size(rows, width), 0.0f);
    std::fill(memory, memory + rows, no_peak);
    return sums_at(memory, rows);
}

// A block's queries, made ready in the thread's scratch memory, on their way through ranges of keys.
Attend queries_of(const Attention& a, const KvSequence& s, const Block& b) {
    const LayerKernels& kernels = layer_kernels();
    const Index share = a.Hq / a.Hkv, width = kv_width(a.type, a.D), rows = padded_rows(b.tokens * share);
    const Index keys = s.past + b.first + b.tokens, size = kv_size(a.type);
    const float scale = 1.0f / std::sqrt(float(a.D));
    Scratch& scratch = scratch_of_thread;
    scratch.q.assign(rows * width, 0.0f);
    scratch.scores.resize(rows * attend_keys);
    scratch.visible.assign(rows, keys);
    for (Index row = 0; row < b.tokens * share; row++) {
        const Index t = b.start + b.first + row / share, head = b.head * share + row % share;
        float* q = &scratch.q[row * width];
        normed(a, a.q.at(t, head), a.q_norm, t, q);
        for (Index i = 0; i < a.D; i++) q[i] *= scale;
        if (a.type == KvType::int4) kernels.rotate(q, a.D);
        scratch.visible[row] = s.past + b.first + row / share + 1;
    }
    const Place at = place(a.Hkv, kv_row(a.type, width), b.head, 0);
    auto scales = [&](bool value) { return scales_of(s.pages[0], a.type, a.Hkv, a.D, value, b.head) - s.pages[0]; };
    Attend queries{};
    queries.type = a.type, queries.rows = rows, queries.width = width, queries.follow = keys;
    queries.q = scratch.q.data(), queries.visible = scratch.visible.data(), queries.scores = scratch.scores.data();
    queries.pages = s.pages.data(), queries.keys = at.keys * size, queries.values = at.values * size;
    queries.key_scales = scales(false), queries.value_scales = scales(true);
    return queries;
}

// The sums over one range.
void attend_range(Attend& queries, Index range, const Sums& sums) {
    queries.begin = range * range_keys;
    queries.end = std::min(queries.begin + range_keys, queries.follow);
    queries.sums = sums;
    layer_kernels().attend(queries);
}

// Sums over all keys -> the layer's output.
void finish_block(const Attention& a, const Block& b, const Sums& all) {
    const LayerKernels& kernels = layer_kernels();
    const Index share = a.Hq / a.Hkv, width = kv_width(a.type, a.D);
    for (Index row = 0; row < b.tokens * share; row++) {
        const Index t = b.start + b.first + row / share, head = b.head * share + row % share;
        const float weight = 1.0f / all.total[row];
        const float* out = all.out + row * width;
        float* y = a.out + (t * a.Hq + head) * a.D;
        for (Index i = 0; i < a.D; i++) y[i] = weight * out[i];
        if (a.type == KvType::int4) kernels.rotate(y, a.D);
        if (a.gate.data) kernels.sigmoid_mul(y, y, a.gate.at(t, head), a.D);
    }
}

std::vector<Block> blocks_of(const Attention& a, const std::vector<KvSequence>& sequences) {
    const Index tokens = std::max<Index>(1, block_rows / (a.Hq / a.Hkv));
    std::vector<Block> blocks;
    for (Index i = 0, start = 0; i < Index(sequences.size()); start += sequences[i++].tokens)
        for (Index first = 0; first < sequences[i].tokens; first += tokens)
            for (Index head = 0; head < a.Hkv; head++)
                blocks.push_back({i, start, first, std::min(tokens, sequences[i].tokens - first), head});
    return blocks;
}

Index ranges_of(const std::vector<KvSequence>& sequences, const Block& b) {
    return (sequences[b.sequence].past + b.first + b.tokens + range_keys - 1) / range_keys;
}

// A block through all of its keys, range after range.
void run_block(const Attention& a, const std::vector<KvSequence>& sequences, const Block& b) {
    Attend queries = queries_of(a, sequences[b.sequence], b);
    const Index size = sums_size(queries.rows, queries.width);
    Scratch& scratch = scratch_of_thread;
    scratch.sums.resize(std::max<Index>(scratch.sums.size(), size));
    scratch.all.resize(std::max<Index>(scratch.all.size(), size));
    const Sums all = no_sums(scratch.all.data(), queries.rows, queries.width);
    const Sums sums = sums_at(scratch.sums.data(), queries.rows);
    for (Index range = 0; range < ranges_of(sequences, b); range++) {
        attend_range(queries, range, sums);
        layer_kernels().merge(all, sums, queries.rows, queries.width);
    }
    finish_block(a, b, all);
}

// Few blocks: `parts` pieces share out each one's ranges, as many ranges at a time as there is memory for.
void share_out(const Attention& a, const std::vector<KvSequence>& sequences, const std::vector<Block>& blocks,
               Index parts) {
    const Index share = a.Hq / a.Hkv, width = kv_width(a.type, a.D), count = Index(blocks.size());
    Index most_rows = 0, most_ranges = 0;
    for (const Block& b : blocks) {
        most_rows = std::max(most_rows, padded_rows(b.tokens * share));
        most_ranges = std::max(most_ranges, ranges_of(sequences, b));
    }
    const Index size = sums_size(most_rows, width), room = Index(kept_nbytes / sizeof(float)) / (size * count);
    const Index wave = std::min(most_ranges, std::max(room, parts)), per_part = (wave + parts - 1) / parts;
    thread_local Floats memory;
    memory.resize(std::max<Index>(memory.size(), count * (wave + 1) * size));
    float* all = memory.data();  // the calling thread's, for all threads
    float* kept = all + count * size;
    for (Index block = 0; block < count; block++) no_sums(all + block * size, most_rows, width);
    auto sums = [&](Index block, Index i) { return sums_at(kept + (block * wave + i) * size, most_rows); };

    for (Index first = 0; first < most_ranges; first += wave) {
        auto end_of = [&](const Block& b) { return std::min(first + wave, ranges_of(sequences, b)); };
        parallel_for(int(count * parts), [&](int piece) {
            const Index block = piece / parts, begin = first + piece % parts * per_part;
            const Block& b = blocks[block];
            const Index end = std::min(begin + per_part, end_of(b));
            if (begin >= end) return;
            Attend queries = queries_of(a, sequences[b.sequence], b);
            for (Index range = begin; range < end; range++) attend_range(queries, range, sums(block, range - first));
        });
        parallel_for(int(count), [&](int block) {
            const Block& b = blocks[block];
            const Sums sum = sums_at(all + block * size, most_rows);
            for (Index range = first; range < end_of(b); range++)
                layer_kernels().merge(sum, sums(block, range - first), padded_rows(b.tokens * share), width);
            if (first < ranges_of(sequences, b) && end_of(b) == ranges_of(sequences, b)) finish_block(a, b, sum);
        });
    }
}

}  // namespace

void append_kv(const Attention& a, const KvSequence& s, Index start) {
    if (s.tokens <= append_alone) {
        for (Index t = 0; t < s.tokens; t++) append_token(a, s, start, t);
        return;
    }
    parallel_for(int((s.tokens + append_tokens - 1) / append_tokens), [&](int piece) {
        const Index end = std::min(s.tokens, (piece + 1) * append_tokens);
        for (Index t = piece * append_tokens; t < end; t++) append_token(a, s, start, t);
    });
}

void attention(const Attention& a, const std::vector<KvSequence>& sequences) {
    Index start = 0;
    for (const KvSequence& s : sequences) {
        append_kv(a, s, start);
        start += s.tokens;
    }
    const std::vector<Block> blocks = blocks_of(a, sequences);
    const Index threads = thread_count(), wanted = 4 * threads;  // pieces
    Index ranges = 1;
    for (const Block& b : blocks) ranges = std::max(ranges, ranges_of(sequences, b));
    if (threads == 1 || ranges == 1 || Index(blocks.size()) >= wanted)
        return parallel_for(int(blocks.size()), [&](int i) { run_block(a, sequences, blocks[i]); });
    share_out(a, sequences, blocks, std::min(ranges, (wanted + Index(blocks.size()) - 1) / Index(blocks.size())));
}

void rope_angles(const int32_t* positions, Index axis_stride, Index stride, Index T, const float* frequencies,
                 float factor, const int* sections, Index pairs, float* cos, float* sin) {
    for (Index i = 0; i < pairs; i++) {
        const Index axis = i % 3 && i < 3 * sections[i % 3] ? i % 3 : 0;
        for (Index t = 0; t < T; t++) {
            const float angle = float(positions[axis * axis_stride + t * stride]) * frequencies[i];
            cos[t * pairs + i] = std::cos(angle) * factor;
            sin[t * pairs + i] = std::sin(angle) * factor;
        }
    }
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

void copy_tokens(const uint8_t* from, uint8_t* to, KvType type, Index heads, Index D, Index tokens) {
    const Index size = kv_size(type), row = kv_row(type, kv_width(type, D)) * size, whole = tokens / kv_tile * kv_tile;
    const auto copy = [&](Index at, Index nbytes) { std::memcpy(to + at, from + at, nbytes); };
    for (Index head = 0; head < heads; head++) {
        const Index keys = head * kv_page * row, values = (heads + head) * kv_page * row;
        copy(keys, whole * row);
        for (Index at = keys + whole * row; at < keys + (whole + kv_tile) * row && whole < tokens; at += kv_tile * size)
            copy(at, (tokens - whole) * size);
        copy(values, tokens * row);
    }
    const Index scale = type == KvType::int8 ? sizeof(float) : sizeof(uint16_t);
    const Index all = kv_page_nbytes(type, heads, D);
    for (Index at = kv_entries_nbytes(type, heads, D); at < all; at += kv_page * scale) copy(at, tokens * scale);
}

}  // namespace edgeq
