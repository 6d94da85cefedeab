// Memory of states and KV pages: blocks of a few sizes that come and go with every token.
//
// malloc would hand each back to the system and take it again, a page fault for every 4 KiB: a sixth of the time of a
// decoded token. Here a block that is given back is the next one taken. Blocks lie sixteen to a region, on huge pages
// where the system has them; a region is unmapped when none of it is in use and another has room.
#pragma once

#include <cstddef>

namespace edgeq {

struct Region;

struct Block {
    char* data;  // on a cache line, not cleared
    Region* region;
};

// Throws std::bad_alloc. Both may be called from any thread.
Block take_block(std::size_t nbytes);
void give_back(Block block);

// Bytes of the blocks that are in use.
std::size_t blocks_nbytes();

// Blocks of a size that nobody uses and that have been used since the system last had their pages: taking one of these
// takes no more memory.
std::size_t idle_blocks(std::size_t nbytes);

// Lets the system have the pages of blocks that are not in use; they are found again, cleared, when they are taken.
void trim_blocks();

}  // namespace edgeq
