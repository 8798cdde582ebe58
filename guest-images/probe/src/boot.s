# Ring 0: the way from the PVH entry to ring 3, the gate back, interrupt stubs, and the
# application processors' way up. Ring 0 may be emulated by the host at a millionth of native
# speed and without SSE, so it is kept this short and everything else runs in ring 3.

.set KERNEL_CS32, 0x08
.set KERNEL_CS, 0x10
.set KERNEL_DS, 0x18
.set USER_DS, 0x2b
.set USER_CS, 0x33
.set TSS_FIRST, 0x40
.set KERNEL_STACK_BYTES, 1024
.set USER_STACK_BYTES, 65536
.set AP_STACK_BYTES, 4096
.set CPUS_MAX, 64
.set PAGE_TABLES, 72
.set GATE_OPERATIONS, 12
.set GATE_MAGIC, 0x65746167

# --- The note by which a VMM finds the 32-bit entry point (XEN_ELFNOTE_PHYS32_ENTRY). ---
.section .note.pvh, "a", @note
    .align 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start

# --- Boot processor: 32-bit protected mode, paging off, ebx = hvm_start_info. ---
.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov dword ptr [start_info], ebx
    rdtsc
    mov dword ptr [entry_tsc], eax
    mov dword ptr [entry_tsc + 4], edx
    mov eax, offset tss
    mov word ptr [gdt + TSS_FIRST + 2], ax
    shr eax, 16
    mov byte ptr [gdt + TSS_FIRST + 4], al
    mov byte ptr [gdt + TSS_FIRST + 7], ah
    mov byte ptr [gdt + TSS_FIRST + 5], 0x89
    mov eax, offset gate
    mov word ptr [idt + 0x60], ax
    shr eax, 16
    mov word ptr [idt + 0x66], ax
    lgdt [gdt_pointer]
    xor ebp, ebp

# Both kinds of processor meet here in 32-bit mode; ebp is the processor's index.
enter_long_mode:
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT; no SMEP or SMAP
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100                       # EFER.LME
    wrmsr
    mov eax, 0x80010033                 # PG, WP, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea
    .long long_mode
    .word KERNEL_CS

.code64
long_mode:
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lidt [idt_pointer]
    mov eax, ebp
    shl eax, 4
    add eax, TSS_FIRST
    ltr ax
    mov eax, ebp
    imul rax, rax, KERNEL_STACK_BYTES
    lea rsp, [rax + kernel_stacks + KERNEL_STACK_BYTES]
    lea rcx, [rip + user_start]
    lea rdx, [rip + user_stack_top - 8]
    test ebp, ebp
    jz 1f
    lea rcx, [rip + application_processor]
    imul rdx, rbp, AP_STACK_BYTES
    lea rdx, [rdx + ap_stacks + AP_STACK_BYTES - 8]
1:  mov edi, ebp
    push USER_DS
    push rdx
    push 2                              # interrupts stay off until ring 3 asks for them
    push USER_CS
    push rcx
    mov eax, USER_DS
    mov ds, eax
    mov es, eax
    iretq

# Ring 3. A VMM that resets the machine loads the image again but need not clear what follows it.
user_start:
    lea rdi, [rip + __bss_start]
    lea rcx, [rip + __bss_end]
    sub rcx, rdi
    xor eax, eax
    rep stosb
    mov edi, dword ptr [rip + start_info]
    jmp probe_main

# --- Application processors: copied to a page below 1 MiB, entered in real mode. ---
.code16
.global trampoline, trampoline_end
trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x0f, 0x01, 0x16              # lgdt [disp16]
    .word trampoline_gdt - trampoline
    mov eax, 0x11
    mov cr0, eax
    .byte 0x66, 0xea
    .long trampoline_32
    .word KERNEL_CS32
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

.code32
trampoline_32:
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebp, dword ptr [ap_index]
    jmp enter_long_mode
.code64

# --- The gate from ring 3: ud2 with the magic number in r9, rax operation, rdi rsi rdx
#     arguments, rax result. r8 is 1 when the operation faulted. An undefined instruction,
#     because not every hypervisor that emulates ring 0 delivers software interrupts from ring 3.
#     The gate pushes nothing: `fault` relies on that. ---
.section .text.gate, "ax"
gate:
    cmp r9d, GATE_MAGIC
    jne exception_6
    add qword ptr [rsp], 2
    xor r8d, r8d
    cmp rax, GATE_OPERATIONS
    jae 1f
    jmp qword ptr [rax * 8 + gate_table]
1:  mov r8d, 1
    iretq
gate_out8:
    mov edx, edi
    mov eax, esi
    out dx, al
    iretq
gate_out16:
    mov edx, edi
    mov eax, esi
    out dx, ax
    iretq
gate_out32:
    mov edx, edi
    mov eax, esi
    out dx, eax
    iretq
gate_in8:
    mov edx, edi
    xor eax, eax
    in al, dx
    iretq
gate_in32:
    mov edx, edi
    in eax, dx
    iretq
gate_out_string:
    mov rcx, rdx
    mov edx, edi
    rep outsb
    iretq
gate_rdmsr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
gate_wrmsr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    iretq
gate_interrupts_on:
    or qword ptr [rsp + 16], 0x200
    iretq
gate_wait:                              # sleep while the word at rdi equals rsi
    cmp qword ptr [rdi], rsi
    jne 1f
    sti
    hlt
1:  iretq
gate_park:
    cli
    hlt
    jmp gate_park
gate_triple_fault:
    lidt [no_idt_pointer]
    iretq                               # the caller's next exception finds no handler

# --- Exceptions. From ring 0 the gate's operation faulted: say so to its caller. From ring 3
#     the probe is broken: let it report in ring 3, where it can print. ---
.macro exception vector, has_code
exception_\vector:
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp fault
.endm
.irp vector, 0,1,2,3,4,5,6,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
    exception \vector, 0
.endr
.irp vector, 8,10,11,12,13,14,17,21,29,30
    exception \vector, 1
.endr
fault:                                  # vector, code, rip, cs, rflags, rsp, ss
    test byte ptr [rsp + 24], 3
    jnz 1f
    mov rsp, qword ptr [rsp + 40]
    mov r8d, 1
    iretq
1:  pop qword ptr [rip + fault_record]
    pop qword ptr [rip + fault_record + 8]
    mov rax, qword ptr [rsp]
    mov qword ptr [rip + fault_record + 16], rax
    mov rax, cr2
    mov qword ptr [rip + fault_record + 24], rax
    lea rax, [rip + fault_report]
    mov qword ptr [rsp], rax
    lea rax, [rip + fault_stack_top - 8]
    mov qword ptr [rsp + 24], rax
    mov qword ptr [rsp + 16], 2
    iretq

# --- Interrupts 0x30 to 0x7f: count and acknowledge. ---
    .balign 32
.global interrupt_stubs
interrupt_stubs:
.set vector, 0x30
.rept 0x50
    push rax
    inc qword ptr [interrupt_counts + (vector - 0x30) * 8]
    jmp acknowledge
    .balign 32
    .set vector, vector + 1
.endr
acknowledge:
    cmp byte ptr [rip + x2apic], 0
    jne 1f
    mov rax, qword ptr [rip + apic_base]
    mov dword ptr [rax + 0xb0], 0
    pop rax
    iretq
1:  push rcx
    push rdx
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
spurious:
    iretq

# --- memcpy and its family, which the compiler calls and no library provides here. ---
.section .text.memory, "ax"
.global memcpy, memmove, memset, memcmp, bcmp
memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jae memcpy
    mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    cmp rax, rax
    repe cmpsb
    je 1f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
1:  ret

# --- Tables. ---
.section .rodata.boot, "a"
    .balign 8
gate_table:
    .quad gate_out8, gate_out16, gate_out32, gate_in8, gate_in32, gate_out_string
    .quad gate_rdmsr, gate_wrmsr, gate_interrupts_on, gate_wait, gate_park, gate_triple_fault
    .if (. - gate_table) / 8 - GATE_OPERATIONS
    .error "GATE_OPERATIONS is wrong"
    .endif
.global exception_table, spurious_entry
exception_table:
    .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .quad exception_\vector
    .endr
spurious_entry:
    .quad spurious

.section .data.boot, "aw"
    .balign 4096
.global pml4, gdt, idt, tss, start_info, ap_index, interrupt_counts, x2apic, apic_base, fault_record, entry_tsc
# The first 4 GiB, identity mapped in 2 MiB pages: present, writable, user, accessed, dirty.
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .quad pd + 0x27, pd + 0x1027, pd + 0x2027, pd + 0x3027
    .fill 508, 8, 0
pd:
    .set page, 0
    .rept 2048
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr
idt:
    .fill 12, 8, 0
    .word 0, KERNEL_CS, 0x8e00, 0, 0, 0, 0, 0
    .fill 498, 8, 0
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            # 0x08 kernel code, 32 bits
    .quad 0x00af9b000000ffff            # 0x10 kernel code
    .quad 0x00cf93000000ffff            # 0x18 kernel data
    .quad 0x00cffb000000ffff            # 0x20 user code, 32 bits
    .quad 0x00cff3000000ffff            # 0x28 user data
    .quad 0x00affb000000ffff            # 0x30 user code
    .quad 0
    .rept CPUS_MAX
    .quad 0x0000890000000067, 0         # task state segment; its base is filled in
    .endr
gdt_end:
tss:
    .long 0
    .quad kernel_stacks + KERNEL_STACK_BYTES
    .fill 88, 1, 0
    .word 0, 104                        # no I/O permission bitmap
    .fill 104 * (CPUS_MAX - 1), 1, 0
    .balign 8
interrupt_counts:
    .fill 0x50, 8, 0
fault_record:
    .fill 4, 8, 0
apic_base:
    .quad 0xfee00000
entry_tsc:
    .quad 0
start_info:
    .long 0
ap_index:
    .long 0
x2apic:
    .byte 0
    .balign 8
    .word 0
idt_pointer:
    .word 4095
    .quad idt
    .balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 8
no_idt_pointer:
    .word 0
    .quad 0

.section .stacks, "aw", @nobits
    .balign 4096
.global kernel_stacks, page_tables
page_tables:                            # cleared one by one as they are used
    .skip 4096 * PAGE_TABLES
user_stack:
    .skip USER_STACK_BYTES
user_stack_top:
fault_stack:
    .skip 16384
fault_stack_top:
kernel_stacks:
    .skip KERNEL_STACK_BYTES * CPUS_MAX
ap_stacks:
    .skip AP_STACK_BYTES * CPUS_MAX
