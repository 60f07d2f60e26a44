// llama-perplexity with caches that rows cannot hold: see examples/ablations.rs.
//
// usage: llama-perplexity-ablations SPECIFICATION [llama-perplexity's arguments, --palu among them]
#include <cstdint>
#include <cstdio>

extern "C" int32_t palu_ablation(const char * specification);

int llama_perplexity(int argc, char ** argv);

int main(int argc, char ** argv) {
    if (argc < 2 || !palu_ablation(argv[1])) {
        fprintf(stderr, "usage: %s SPECIFICATION [llama-perplexity's arguments]; see examples/ablations.rs\n", argv[0]);
        return 1;
    }

    argv[1] = argv[0];

    return llama_perplexity(argc - 1, argv + 1);
}
