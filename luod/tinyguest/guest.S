# SPDX-License-Identifier: Apache-2.0
#
# A guest that notices everything. A flat 32-bit kernel for `qemu-system-x86_64 -kernel`, started as the Multiboot Specification
# 0.6.96 says, without libc. Words of the command line (-append), all decimal:
#     seed=N    what the pattern in memory depends on, beside the address   (1)
#     hz=N      ticks a second, 1 to 1000                                    (10)
#     chunk=N   KiB of memory checked in each tick                           (256)
#
# All memory above this image, up to 2 GiB, holds the pattern  word(a) = ((a ^ seed) * FACTOR) + pass.  Each tick checks the next
# chunk and writes the words of the next pass into it, so that memory that is another guest's, damaged, or older than the registers
# is seen as words that are not what they should be. Between two ticks the processor halts.
#
# On the first serial port:
#     tinyguest boot seed S memory KIB hz H chunk C        once, at boot
#     tick N pass P bad B seed S                           every tick
#     trap                                                 an exception, which there must not be

        .intel_syntax noprefix
        .code32

        .set MAGIC, 0x1badb002
        .set FLAGS, 0x00010002          # memory sizes wanted; the addresses below are valid
        .set FACTOR, 0x9e3779b1
        .set COM1, 0x3f8
        .set PIT_HZ, 1193182
        .set SLOWEST_PIT_HZ, 20         # the divisor of the timer has 16 bits, so it cannot go below 18.2 Hz
        .set MOST_KIB, 2047 * 1024      # above the first MiB; there may be a hole for devices above 2 GiB

        .text
        .globl  start
header:
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
        .long   header, header, image_end, bss_end, start

start:
        cli
        cld
        mov     esp, offset stack_top
        lgdt    [gdt_pointer]
        mov     ax, 0x10
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        jmp     0x08:in_segments
in_segments:
        mov     eax, [ebx + 8]          # mem_upper, in KiB above the first MiB
        cmp     eax, MOST_KIB
        jbe     1f
        mov     eax, MOST_KIB
1:      add     eax, 1024
        mov     [kib], eax
        shl     eax, 10
        mov     [memory_end], eax

        mov     ebx, [ebx + 16]         # the command line; it may lie in memory that is filled below
        mov     edi, offset seed_word
        mov     eax, 1
        call    option
        mov     [seed], eax
        mov     edi, offset hz_word
        mov     eax, 10
        call    option
        mov     ecx, 1000
        call    clamp
        mov     [hz], eax
        mov     edi, offset chunk_word
        mov     eax, 256
        call    option
        mov     ecx, MOST_KIB
        call    clamp
        mov     [chunk], eax

        mov     edi, offset memory_start
        mov     [cursor], edi
fill:   mov     eax, edi
        xor     eax, [seed]
        imul    eax, eax, FACTOR
        mov     [edi], eax
        add     edi, 4
        cmp     edi, [memory_end]
        jb      fill

        call    serial
        mov     esi, offset banner_text
        call    print
        mov     eax, [seed]
        call    number
        mov     esi, offset memory_text
        call    print
        mov     eax, [kib]
        call    number
        mov     esi, offset hz_text
        call    print
        mov     eax, [hz]
        call    number
        mov     esi, offset chunk_text
        call    print
        mov     eax, [chunk]
        call    number
        call    newline
        call    interrupts

        # Sleep until the timer has fired `beats` times; sti takes effect after the next instruction, so no interrupt is missed.
sleep:  cli
        mov     eax, [fired]
        cmp     eax, [beats]
        jae     tick
        sti
        hlt
        jmp     sleep
tick:   mov     dword ptr [fired], 0
        sti
        inc     dword ptr [ticks]

        mov     edi, [cursor]
        mov     ecx, [chunk]
        shl     ecx, 8                  # words
        mov     ebx, [pass]
check:  mov     eax, edi
        xor     eax, [seed]
        imul    eax, eax, FACTOR
        add     eax, ebx
        cmp     eax, [edi]
        je      1f
        inc     dword ptr [bad]
1:      inc     eax
        mov     [edi], eax
        add     edi, 4
        cmp     edi, [memory_end]
        jb      2f
        mov     edi, offset memory_start
        inc     ebx
2:      dec     ecx
        jnz     check
        mov     [cursor], edi
        mov     [pass], ebx

        mov     esi, offset tick_text
        call    print
        mov     eax, [ticks]
        call    number
        mov     esi, offset pass_text
        call    print
        mov     eax, [pass]
        call    number
        mov     esi, offset bad_text
        call    print
        mov     eax, [bad]
        call    number
        mov     esi, offset seed_text
        call    print
        mov     eax, [seed]
        call    number
        call    newline
        jmp     sleep

# eax := the number behind the word edi on the command line ebx; it stays as it is when the word is not there.
option: mov     esi, ebx
1:      cmp     byte ptr [esi], 0
        je      5f
        push    esi
        push    edi
2:      mov     dl, [edi]
        test    dl, dl
        jz      3f
        cmp     dl, [esi]
        jne     6f
        inc     esi
        inc     edi
        jmp     2b
3:      add     esp, 8
        xor     eax, eax
4:      movzx   edx, byte ptr [esi]
        sub     edx, '0'
        cmp     edx, 9
        ja      5f
        imul    eax, eax, 10
        add     eax, edx
        inc     esi
        jmp     4b
5:      ret
6:      pop     edi
        pop     esi
        inc     esi
        jmp     1b

# eax := eax, but at least 1 and at most ecx.
clamp:  cmp     eax, ecx
        jbe     1f
        mov     eax, ecx
1:      cmp     eax, 1
        adc     eax, 0
        ret

serial: mov     dx, COM1 + 1
        xor     eax, eax
        out     dx, al                  # no interrupts
        mov     dx, COM1 + 3
        mov     al, 3
        out     dx, al                  # eight bits, no parity
        ret

# Print the text at esi.
print:  lodsb
        test    al, al
        jz      1f
        call    put
        jmp     print
1:      ret

newline:
        mov     al, 10
put:    mov     ah, al
        mov     dx, COM1 + 5
1:      in      al, dx
        test    al, 0x20
        jz      1b
        mov     al, ah
        mov     dx, COM1
        out     dx, al
        ret

# Print eax in decimal.
number: mov     ecx, 10
        xor     ebx, ebx
1:      xor     edx, edx
        div     ecx
        push    edx
        inc     ebx
        test    eax, eax
        jnz     1b
2:      pop     eax
        add     al, '0'
        call    put
        dec     ebx
        jnz     2b
        ret

interrupts:
        mov     edi, offset idt
        mov     ecx, 32
        mov     eax, offset trap
1:      call    gate
        loop    1b
        mov     eax, offset timer
        call    gate
        lidt    [idt_pointer]

        mov     al, 0x11                # both interrupt controllers: start, vectors from 32 and 40, cascade, 8086 mode
        out     0x20, al
        out     0xa0, al
        mov     al, 32
        out     0x21, al
        mov     al, 40
        out     0xa1, al
        mov     al, 4
        out     0x21, al
        mov     al, 2
        out     0xa1, al
        mov     al, 1
        out     0x21, al
        out     0xa1, al
        mov     al, 0xfe                # the timer only
        out     0x21, al
        mov     al, 0xff
        out     0xa1, al

        xor     ebx, ebx                # the timer fires `beats` times a tick, so that it is fast enough for its divisor
        xor     ecx, ecx
2:      add     ecx, [hz]
        inc     ebx
        cmp     ecx, SLOWEST_PIT_HZ
        jb      2b
        mov     [beats], ebx
        mov     eax, PIT_HZ
        xor     edx, edx
        div     ecx
        mov     ebx, eax
        mov     al, 0x34                # channel 0, rate generator
        out     0x43, al
        mov     al, bl
        out     0x40, al
        mov     al, bh
        out     0x40, al
        ret

# Write an interrupt gate to eax at edi, and go to the next.
gate:   mov     [edi], ax
        mov     word ptr [edi + 2], 0x08
        mov     word ptr [edi + 4], 0x8e00
        mov     edx, eax
        shr     edx, 16
        mov     [edi + 6], dx
        add     edi, 8
        ret

timer:  push    eax
        inc     dword ptr [fired]
        mov     al, 0x20
        out     0x20, al
        pop     eax
        iretd

trap:   mov     esi, offset trap_text
        call    print
1:      cli
        hlt
        jmp     1b

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      # code, 4 GiB
        .quad   0x00cf92000000ffff      # data, 4 GiB
gdt_pointer:
        .word   23
        .long   gdt
idt_pointer:
        .word   33 * 8 - 1
        .long   idt

seed_word:      .asciz  " seed="
hz_word:        .asciz  " hz="
chunk_word:     .asciz  " chunk="
banner_text:    .asciz  "tinyguest boot seed "
memory_text:    .asciz  " memory "
hz_text:        .asciz  " hz "
chunk_text:     .asciz  " chunk "
tick_text:      .asciz  "tick "
pass_text:      .asciz  " pass "
bad_text:       .asciz  " bad "
seed_text:      .asciz  " seed "
trap_text:      .asciz  "trap\n"
        .balign 4
image_end:

        .bss
        .balign 16
idt:    .skip   33 * 8
ticks:  .skip   4
pass:   .skip   4
bad:    .skip   4
fired:  .skip   4
beats:  .skip   4
cursor: .skip   4
memory_end:
        .skip   4
kib:    .skip   4
seed:   .skip   4
hz:     .skip   4
chunk:  .skip   4
stack:  .skip   4096
stack_top:
        .balign 4096
memory_start:
bss_end:
