// Does what a script on the command line says with one llama.cpp context, through the public API alone, and writes the
// logits of every evaluated token to a file. The tests compare such files.
//
//   palu-steps MODEL OUT [--palu FILE] [--palu-bits B] [--palu-recent N] [--type f32|f16|q8_0|q4_0] [--ctx N] [--ubatch N] [--seqs N]
//              [--unified] [--fa 0|1] [--threads N] [--ngl N] STEP...
//
//   eval:SEQ@POS:T,T,..[+SEQ@POS:T,..]   one batch of tokens T of sequence SEQ from position POS on
//   rand:SEQ@POS:N:SEED                  the same with N tokens of a seeded generator
//   rm:SEQ:P0:P1   cp:FROM:TO:P0:P1   add:SEQ:P0:P1:DELTA   keep:SEQ   clear
//   save:FILE   load:FILE   save-seq:SEQ:FILE   load-seq:SEQ:FILE
//
// Exit status: 0, 1 (a step failed), 2 (usage), 3 (model or context refused).

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

static std::vector<std::string> split(const std::string & text, char sep) {
    std::vector<std::string> parts;
    std::stringstream        stream(text);
    for (std::string part; std::getline(stream, part, sep);) {
        parts.push_back(part);
    }
    return parts;
}

[[noreturn]] static void fail(int status, const std::string & text) {
    fprintf(stderr, "palu-steps: %s\n", text.c_str());
    exit(status);
}

struct run_tokens {
    llama_seq_id             seq;
    llama_pos                pos;
    std::vector<llama_token> tokens;
};

static void eval(llama_context * ctx, int n_vocab, const std::vector<run_tokens> & runs, FILE * out) {
    size_t n = 0;
    for (const auto & run : runs) {
        n += run.tokens.size();
    }
    llama_batch batch = llama_batch_init(n, 0, 1);
    for (const auto & run : runs) {
        for (size_t i = 0; i < run.tokens.size(); ++i) {
            const int j = batch.n_tokens++;
            batch.token[j]     = run.tokens[i];
            batch.pos[j]       = run.pos + i;
            batch.n_seq_id[j]  = 1;
            batch.seq_id[j][0] = run.seq;
            batch.logits[j]    = 1;
        }
    }
    const int status = llama_decode(ctx, batch);
    if (status != 0) {
        fail(1, "llama_decode returned " + std::to_string(status));
    }
    for (size_t j = 0; j < n; ++j) {
        fwrite(llama_get_logits_ith(ctx, j), sizeof(float), n_vocab, out);
    }
    llama_batch_free(batch);
}

static run_tokens place(const std::string & text) {
    const size_t at = text.find('@');
    if (at == std::string::npos) {
        fail(2, "not SEQ@POS: " + text);
    }
    return { std::stoi(text.substr(0, at)), std::stoi(text.substr(at + 1)), {} };
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fail(2, "usage: palu-steps MODEL OUT [OPTION ...] STEP ...");
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_WARN) {
            fputs(text, stderr);
        }
    }, nullptr);

    auto mparams = llama_model_default_params();
    auto cparams = llama_context_default_params();
    cparams.n_ctx     = 512;
    cparams.n_threads = cparams.n_threads_batch = 2;
    cparams.n_seq_max = 1;
    cparams.type_k    = cparams.type_v = GGML_TYPE_F16;
    cparams.n_ubatch  = 512;
    mparams.n_gpu_layers = 0;

    std::vector<std::string> steps;
    for (int i = 3; i < argc; ++i) {
        const std::string arg = argv[i];
        const auto value = [&]() -> std::string {
            if (i + 1 >= argc) {
                fail(2, arg + " needs a value");
            }
            return argv[++i];
        };
        if (arg == "--palu") {
            mparams.palu = argv[i + 1 < argc ? ++i : i];
        } else if (arg == "--palu-bits") {
            mparams.palu_bits = std::stod(value());
        } else if (arg == "--palu-recent") {
            mparams.palu_recent = std::stoi(value());
        } else if (arg == "--type") {
            const std::string type = value();
            cparams.type_k = cparams.type_v = type == "f32" ? GGML_TYPE_F32 : type == "q8_0" ? GGML_TYPE_Q8_0 :
                type == "q4_0" ? GGML_TYPE_Q4_0 : GGML_TYPE_F16;
        } else if (arg == "--ctx") {
            cparams.n_ctx = std::stoi(value());
        } else if (arg == "--ubatch") {
            cparams.n_ubatch = std::stoi(value());
        } else if (arg == "--seqs") {
            cparams.n_seq_max = std::stoi(value());
        } else if (arg == "--unified") {
            cparams.kv_unified = true;
        } else if (arg == "--fa") {
            cparams.flash_attn_type = value() == "1" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        } else if (arg == "--threads") {
            cparams.n_threads = cparams.n_threads_batch = std::stoi(value());
        } else if (arg == "--ngl") {
            mparams.n_gpu_layers = std::stoi(value());
        } else if (arg.rfind("--", 0) == 0) {
            fail(2, "unknown option " + arg);
        } else {
            steps.push_back(arg);
        }
    }
    cparams.n_batch = cparams.n_ctx;

    ggml_backend_load_all();
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    if (!model) {
        fail(3, "the model was refused");
    }
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (!ctx) {
        fail(3, "the context was refused");
    }
    llama_memory_t mem = llama_get_memory(ctx);
    const int n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(model));

    FILE * out = fopen(argv[2], "wb");
    if (!out) {
        fail(1, std::string("cannot write ") + argv[2]);
    }
    for (const auto & step : steps) {
        const auto a  = split(step, ':');
        const auto id = [&](size_t i) { return i < a.size() ? std::stoi(a[i]) : (fail(2, "too short: " + step), 0); };
        if (a[0] == "eval") {
            std::vector<run_tokens> runs;
            for (const auto & part : split(step.substr(5), '+')) {
                const auto b = split(part, ':');
                runs.push_back(place(b.at(0)));
                for (const auto & token : split(b.at(1), ',')) {
                    runs.back().tokens.push_back(std::stoi(token));
                }
            }
            eval(ctx, n_vocab, runs, out);
        } else if (a[0] == "rand") {
            std::vector<run_tokens> runs;
            for (const auto & part : split(step.substr(5), '+')) {
                const auto b = split(part, ':');
                runs.push_back(place(b.at(0)));
                std::mt19937 gen(std::stoul(b.at(2)));
                for (int i = 0; i < std::stoi(b.at(1)); ++i) {
                    runs.back().tokens.push_back(gen() % n_vocab);
                }
            }
            eval(ctx, n_vocab, runs, out);
        } else if (a[0] == "rm") {
            if (!llama_memory_seq_rm(mem, id(1), id(2), id(3))) {
                fail(1, "seq_rm failed: " + step);
            }
        } else if (a[0] == "cp") {
            llama_memory_seq_cp(mem, id(1), id(2), id(3), id(4));
        } else if (a[0] == "add") {
            if (!llama_memory_can_shift(mem)) {
                fail(1, "this memory cannot shift");
            }
            llama_memory_seq_add(mem, id(1), id(2), id(3), id(4));
        } else if (a[0] == "keep") {
            llama_memory_seq_keep(mem, id(1));
        } else if (a[0] == "clear") {
            llama_memory_clear(mem, true);
        } else if (a[0] == "save" || a[0] == "save-seq") {
            const bool whole = a[0] == "save";
            std::vector<uint8_t> data(whole ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, id(1)));
            const size_t n = whole ? llama_state_get_data(ctx, data.data(), data.size()) : llama_state_seq_get_data(ctx, data.data(), data.size(), id(1));
            std::ofstream(a.back(), std::ios::binary).write((const char *) data.data(), n);
        } else if (a[0] == "load" || a[0] == "load-seq") {
            std::ifstream file(a.back(), std::ios::binary);
            std::vector<uint8_t> data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
            const size_t n = a[0] == "load" ? llama_state_set_data(ctx, data.data(), data.size()) : llama_state_seq_set_data(ctx, data.data(), data.size(), id(1));
            if (n == 0) {
                fail(1, "the state was refused: " + step);
            }
        } else {
            fail(2, "unknown step " + step);
        }
    }
    fclose(out);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
