/* A plugin of qemu (interface: docs/devel/tcg-plugins of qemu, version 1): counts the instructions that a program runs.
 * When it ends, stderr gets a line "count file" for every file that had some: the program, its libraries, and "?" for
 * what is in none. Only exact for a program of one thread. Declared here, because Debian has no package of the header.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, int op, void*, uint64_t);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void*), void*);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
extern struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
extern void* qemu_plugin_insn_haddr(const struct qemu_plugin_insn*);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

/* A block of code as it was translated, and the instructions that were run in it. */
struct block {
    uintptr_t address;
    uint64_t count;
    struct block* next;
};
static struct block* blocks;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* code) {
    (void)id;
    struct block* block = malloc(sizeof *block);
    if (!block) abort();
    block->address = (uintptr_t)qemu_plugin_insn_haddr(qemu_plugin_tb_get_insn(code, 0));
    block->count = 0;
    block->next = blocks;
    blocks = block;
    qemu_plugin_register_vcpu_tb_exec_inline(code, 0 /* add */, &block->count, qemu_plugin_tb_n_insns(code));
}

/* A mapping of this process's memory, with the file it is of; the last one is all that no other has. */
struct mapping {
    uintptr_t start, stop;
    char file[1024];
    uint64_t count;
};

static size_t read_mappings(struct mapping** found) {
    struct mapping* all = NULL;
    size_t n = 0;
    char line[2048];
    FILE* maps = fopen("/proc/self/maps", "r");
    for (int more = maps != NULL; more; n++) {
        all = realloc(all, (n + 1) * sizeof *all);
        if (!all) abort();
        memset(&all[n], 0, sizeof *all);
        more = fgets(line, sizeof line, maps) != NULL;
        if (!more || sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %*s %1023[^\n]", &all[n].start, &all[n].stop,
                            all[n].file) < 3)
            strcpy(all[n].file, "?");
    }
    *found = all;
    return n;
}

static void ended(qemu_plugin_id_t id, void* nothing) {
    (void)id, (void)nothing;
    struct mapping* all;
    size_t n = read_mappings(&all);
    for (struct block* block = blocks; block; block = block->next) {
        size_t i = 0;
        while (i + 1 < n && !(all[i].start <= block->address && block->address < all[i].stop)) i++;
        if (n) all[i].count += block->count;
    }
    for (size_t i = 0; i < n; i++) { /* a file has several mappings */
        for (size_t j = i + 1; j < n; j++)
            if (!strcmp(all[i].file, all[j].file)) all[i].count += all[j].count, all[j].count = 0;
        if (all[i].count) fprintf(stderr, "%" PRIu64 " %s\n", all[i].count, all[i].file);
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int n,
                                                               char** args) {
    (void)info, (void)n, (void)args;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
