  python distill/DATM.py --cfg=configs/MiniFashion/ConvIN/IPC1.yaml \
      --dataset=ImageFolder --model=ConvNetD4W32 --zca=False --res=64 \
      --data_path=photos3 \
      --buffer_path=experts/photos3 --ipc=1 --factor=2 \
      --lr_teacher=0.001 --syn_steps=20 --expert_epochs=1 --min_start_epoch=0 \
      --max_start_epoch=7 --threshold=1.4 --epoch_eval_train=1000 \
      --lr_img=1000.0 --lr_y=3.0
