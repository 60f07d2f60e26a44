// check_step.cuh - one decoded token as a running model has it: each layer's kernels between other kernels, which leave nothing of the
// layer's tables in the L2 cache. Part of check.cu.
#pragma once

// What a layer's weights do to the cache.
static __global__ void read_all(const uint4 * from, int64_t n, uint4 * to) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (int64_t i = (int64_t) blockIdx.x*blockDim.x + threadIdx.x; i < n; i += (int64_t) gridDim.x*blockDim.x) {
        const uint4 x = from[i];
        sum = make_uint4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    if (sum.x == 1 && sum.y == 2 && sum.z == 3 && sum.w == 4) {
        *to = sum;
    }
}

struct StepLayer {
    palu_cuda_attn attn;
    palu_cuda_store store;
    palu_cuda_recent recent;
    Plan plan;
    palu_cuda_launch stores[2], few[2], recents[1];
};

static void bench_step(Case c, const std::vector<int> & sizes) {
    if (left_out(c.name)) {
        return;
    }
    const int n_layer = 8, n_recent = 16;
    const size_t weights = 140u << 20;
    for (int n_kv : sizes) {
        if (only_size && only_size != n_kv) {
            continue;
        }
        c.n_kv = n_kv;
        std::vector<StepLayer> layers;
        const uint4 * filler = (const uint4 *) room(weights*3);
        uint4 * sink = (uint4 *) room(16);
        for (int il = 0; il < n_layer; il++) {
            Problem x = make_problem(c, false);
            StepLayer l = {};
            palu_cuda_attn & p = l.attn = x.p;
            for (int side = 0; side < 2; side++) {
                const palu_cuda_side & s = side ? p.v : p.k;
                uint8_t * rows = upload_again(random_rows(side ? x.v : x.k, 256), n_kv, s.row_bytes);
                (side ? p.rows_v : p.rows_k) = rows;
                const int width = s.n_head_kv*s.head_dim;
                std::vector<float> cur(width), step(s.rank_sum, 0.5f);
                for (float & f : cur) {
                    f = gauss();
                }
                palu_cuda_stored & of = l.store.of[side];
                of.side = s;
                of.side.step = upload(step);
                of.side.enc = upload(std::vector<uint16_t>((size_t) s.rank_sum*s.group_size*s.head_dim, 0x2400));
                of.x = upload(cur);
                of.x_nb_head = s.head_dim*4;
                of.x_nb_token = width*4;
                of.idxs = upload(std::vector<int64_t>{ n_kv - 1 });
                of.rows = rows;
                of.latent = (float *) room(s.rank_sum*4);
                l.recent.cur[side] = of.x;
                l.recent.cur_nb_head[side] = of.x_nb_head;
                l.recent.cur_nb_token[side] = of.x_nb_token;
                l.recent.slots[side] = upload(std::vector<uint16_t>((size_t) n_recent*width, 0x3000));
            }
            l.store.n_side = 2;
            l.store.n_token = 1;
            palu_cuda_plan_store(&device, &l.store, l.stores);
            l.store.done = upload(std::vector<uint32_t>(2*c.n_head_kv));
            l.store.beside = STORE_FEW_FROM_CELLS;
            palu_cuda_plan_store(&device, &l.store, l.few);
            std::vector<int32_t> idxs;
            for (int i = 0; i < n_recent; i++) {
                idxs.push_back(i ? i : n_recent);
            }
            idxs.push_back(0);
            palu_cuda_recent & r = l.recent;
            r.q = p.q;
            r.q_nb_head = p.q_nb_head;
            r.q_nb_token = p.q_nb_token;
            r.q_nb_stream = p.q_nb_stream;
            r.idxs = upload(idxs);
            p.extra = r.out = (float *) room((size_t) c.n_head*(4 + c.hd_v)*4);
            r.n_head = c.n_head;
            r.n_head_kv = c.n_head_kv;
            r.head_dim_k = c.hd_k;
            r.head_dim_v = c.hd_v;
            r.n_token = r.n_stream = r.store = 1;
            r.n_slot = r.n_recent = n_recent;
            r.scale = p.scale;
            palu_cuda_plan_recent(&r, l.recents);
            l.plan = plan(device, p);
            p.partial = (float *) room(palu_cuda_partial_size(&p)*4);
            p.out = (float *) room((size_t) c.n_head*c.hd_v*4);
            layers.push_back(l);
        }
        // what: filler, project, quantize before, attend, recent, quantize beside or both beside, combine
        auto time_of = [&](const char * what) {
            auto launch_all = [&](cudaStream_t on) {
                for (int il = 0; il < n_layer; il++) {
                    StepLayer & l = layers[il];
                    for (const char * w = what; *w; w++) {
                        l.store.beside = *w == 'q' || *w == 'S';
                        l.recent.beside = strchr(what, 'q') || strchr(what, 'S');
                        l.attn.part.beside = l.recent.beside && strstr(l.plan.decode.kernel, "cluster");
                        switch (*w) {
                            case 'f': read_all<<<132*4, 512, 0, on>>>(filler + weights/16*(il%3), weights/16, sink); break;
                            case 'P': launch(l.stores[0], l.store, on); break;
                            case 'Q': case 'q': launch(l.stores[1], l.store, on); break;
                            case 'S': launch(l.few[1], l.store, on); break;
                            case 'C': launch_decode(l.plan, l.attn, on); break;
                            case 'R': launch(l.recents[0], l.recent, on); break;
                            case 'D': launch(l.plan.combine, l.attn, on); break;
                        }
                    }
                }
            };
            launch_all(0); // sets the attributes
            CHECK(cudaDeviceSynchronize());
            return time_graph_us(12, launch_all)/n_layer;
        };
        const double rest = time_of("f");
        printf("%s, %d cells, %s, per layer; without the %.1f us of what runs between:\n", c.name, n_kv, layers[0].plan.decode.kernel, rest);
        for (const char * what : { "fCRSD", "fCSRD", "fPCRqD", "fPQRCD", "fPCD", "fCD", "fC", "fD", "fP", "fPQ", "fS", "fR", "fCRD" }) {
            printf("  %-8s%6.1f us\n", what + 1, time_of(what) - rest);
        }
        printf("  nothing between: CRSD %.1f us, PCRqD %.1f us, PQRCD %.1f us, CD %.1f us\n", time_of("CRSD"), time_of("PCRqD"), time_of("PQRCD"), time_of("CD"));
        fflush(stdout);
        free_all();
    }
}
